"""Runs a function of a test file in two fresh processes that form one gloo group.

A worker is a module-level function of a test file in this folder. It receives strings and writes its results to files.
The run fails if a worker warns, or if the group has another size than two.
"""

import importlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fresh_processes import PROGRAMS, fork_server

WORLD_SIZE = 2
TESTS = Path(__file__).parents[1]  # holds helpers.py, which the workers import
PATIENCE = 240  # seconds


def run_on_two(worker: Callable[..., None], *arguments: Any, environment: Mapping[str, str] = {}) -> str:
    """Runs the worker on both ranks and returns their output. Fails with the output if a rank fails or times out."""
    file = worker.__code__.co_filename
    return run_script(
        Path(__file__), file, worker.__name__, *arguments, environment=environment, warnings_are_errors=True
    )


def run_script(
    script: Path, *arguments: Any, environment: Mapping[str, str] = {}, warnings_are_errors: bool = False
) -> str:
    """Runs the same script as rank 0 and as rank 1, as `torchrun --nproc-per-node 2` does."""
    port = free_port()
    processes = fork_server(*PROGRAMS).run_together(
        str(script),
        *arguments,
        environments=[environment_of(rank, port) | dict(environment) for rank in range(WORLD_SIZE)],
        kind="script",
        warnings_are_errors=warnings_are_errors,
        timeout=PATIENCE,
    )
    printed = "\n".join(f"rank {rank}:\n{process.stdout}{process.stderr}" for rank, process in enumerate(processes))
    codes = [process.returncode for process in processes]
    assert codes == [0] * WORLD_SIZE, f"exit codes {codes} of {processes[0].args}\n{printed}"
    return printed


def environment_of(rank: int, port: int) -> dict[str, str]:
    """Environment variables of one rank: those of torchrun, and PYTHONPATH for helpers.py."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> None:
    file, name, *arguments = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    assert torch.distributed.get_world_size() == WORLD_SIZE
    # This script's folder is the first entry of sys.path, so the test file is found by its name.
    getattr(importlib.import_module(Path(file).stem), name)(*arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
