"""The provenance of a figure: the command that reprints it, and the machine."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def own_command(without: Sequence[str] = (), keep_folders: bool = False) -> str:
    """The command that started this process, without the folders of this machine and without tokens of the Hub.

    Args:
        without: options that are left out, with their values.
        keep_folders: keep absolute paths, for a command that is run again on this machine. Else their names stay.
    """
    script = Path(sys.argv[0])
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None:  # python -m
        launcher = [*launcher_of_processes(), "-m", module.name]
    elif script.suffix == ".py":
        launcher = [*launcher_of_processes(), script.name if script.is_absolute() else str(script)]
    else:
        launcher = [script.name]
    words, is_left_out = [], False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            option = word.partition("=")[0]
            is_left_out = option in without or re.search("[-_]token$", option) is not None  # a secret
        if not is_left_out:
            words.append(word if keep_folders else without_folders(word))
    return shlex.join([*launcher, *words])


def launcher_of_processes() -> list[str]:
    """The words that start as many processes as there are: `python`, `accelerate launch` or `torchrun`."""
    if (count := os.environ.get("WORLD_SIZE", "1")) == "1":
        return ["python"]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return ["accelerate", "launch", "--num_processes", count]
    of_this_host = os.environ.get("LOCAL_WORLD_SIZE", count)
    nodes = [] if of_this_host == count else ["--nnodes", str(int(count) // int(of_this_host))]
    return ["torchrun", *nodes, "--nproc-per-node", of_this_host]


def without_folders(word: str) -> str:
    """The word with the name in the place of an absolute path, also in `--train-file=/home/me/book.txt`."""
    option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value).expanduser()
    return f"{option}{sign}{path.name}" if path.is_absolute() and path.name else word


def processor() -> str:
    """The vendor, family and model where Linux tells them, such as "AuthenticAMD 25 17"."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    found = re.findall(r"^(?:vendor_id|cpu family|model)\s*: (.+)$", text, re.MULTILINE)[:3]
    return " ".join(found) or platform.machine()


def describe_machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
