"""Measures time in turn and peak memory, for the benchmarks."""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_mos.tools.provenance import processor


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """The median seconds of each call. Each round runs all calls, so that a slow moment of the machine hits all.

    `before` runs ahead of each call and is not timed. Garbage is collected once: that reads all objects of Python, and
    the call after it finds none of its own in the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for round_ in track(range(rounds + 1), description="timing", console=Console(stderr=True), transient=True):
        for name, call in calls.items():
            if before is not None:
                before()
            start = now(device, clock)
            call()
            if round_:  # the first round warms up
                seconds[name].append(now(device, clock) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def now(device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return clock()


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """How far memory in use rises while `call` runs, and above what it leaves behind in its result.

    On the CPU the kernel's high-water mark of this process, so run it in a process of its own where the allocator has
    not kept anything back; on CUDA the allocator's.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status_bytes("VmRSS")
        result = call()
        peak = status_bytes("VmHWM")
    kept = sum(tensor.numel() * tensor.element_size() for tensor in result)
    return max(0, peak - before - kept)


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    cores, threads = os.cpu_count(), torch.get_num_threads()
    found = {"cpu": processor(), "cores": cores, "threads": threads, "torch": torch.__version__}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {})


def report(title: str, rows: list[dict[str, Any]], settings: dict[str, Any], as_json: bool) -> None:
    """Prints a table on the terminal, or JSON."""
    if as_json:
        print(json.dumps({"title": title, "settings": settings, "machine": machine(), "rows": rows}, indent=2))
        return
    table = Table(title=title, caption=", ".join(f"{key} {value}" for key, value in machine().items()))
    for column in rows[0]:
        table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    Console(width=max(100, Console().width)).print(table)
