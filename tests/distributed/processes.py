"""Functions of a test file, run in two fresh processes of one gloo group.

A worker is a function at the top of a test file. Its arguments are texts; it leaves its results in files. It fails on
a warning, and where it would run alone.
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
PATIENCE = 240.0  # seconds


def run_on_two(worker: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None) -> str:
    """Runs the worker on both ranks. Returns what they printed; fails with it when one fails or takes too long."""
    file = worker.__code__.co_filename
    return run_command(
        [sys.executable, "-W", "error", __file__, file, worker.__name__, *map(str, arguments)], environment
    )


def run_command(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs a command as both ranks of a group, as `torchrun --nproc-per-node 2` would."""
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
    return os.environ | {
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
    """Ends those that still run, and what they started."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    file, name, *arguments = sys.argv[1:]
    sys.path[:0] = [str(Path(file).parent), str(Path(file).parents[1])]
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    assert torch.distributed.get_world_size() == WORLD_SIZE
    getattr(importlib.import_module(Path(file).stem), name)(*arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
