"""The provenance of a figure: the command that reprints it, and the machine."""

import shlex
import sys
from pathlib import Path

import torch


def own_command() -> str:
    """The command that started this process, without the folders of this machine."""
    script = Path(sys.argv[0])
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None:  # python -m
        launcher = ["python", "-m", module.name]
    elif script.suffix == ".py":
        launcher = ["python", script.name if script.is_absolute() else str(script)]
    else:
        launcher = [script.name]
    return shlex.join([*launcher, *sys.argv[1:]])


def describe_machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
