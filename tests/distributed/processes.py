"""Runs a function of a test file in two fresh processes that form one gloo group.

A worker is a module-level function of a test file in this folder. It receives strings and writes its results to files.
The run fails if a worker warns, or if the group has another size than two.
"""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
TESTS = Path(__file__).parents[1]  # holds helpers.py, which the workers import
PATIENCE = 240.0  # seconds


def run_on_two(worker: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None) -> str:
    """Runs the worker on both ranks and returns their output. Fails with the output if a rank fails or times out."""
    file = worker.__code__.co_filename
    return run_command(
        [sys.executable, "-W", "error", __file__, file, worker.__name__, *map(str, arguments)], environment
    )


def run_command(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs the same command as rank 0 and as rank 1, as `torchrun --nproc-per-node 2` does."""
    port = free_port()
    processes = [
        subprocess.Popen(
            command,
            env=environment_of(rank, port) | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    deadline = time.monotonic() + PATIENCE
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        failed = [process.poll() for process in processes]
    finally:
        stop(processes)
    printed = "\n".join(f"rank {rank}:\n{process.communicate()[0]}" for rank, process in enumerate(processes))
    assert failed == [0] * WORLD_SIZE, f"exit codes {failed} of {command}\n{printed}"
    return printed


def environment_of(rank: int, port: int) -> dict[str, str]:
    """Environment variables of one rank: those of torchrun, and PYTHONPATH for helpers.py."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def stop(processes: list[subprocess.Popen]) -> None:
    """Kills the processes that still run, together with their children."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


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
