"""What both comparisons of heads need around their trainings: fresh processes, peak memory, and a result in place."""

import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.table import Table

RESULTS_FILE = "results.json"
Result = TypeVar("Result")

# Loads the checkpoint as a user does: without hf_mos, by the code beside the weights.
RELOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
set_seed(0)
if tokenizer.chat_template:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                           add_generation_prompt=True)
inputs = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.7, top_p=0.9)
start = inputs["input_ids"].shape[1] if tokenizer.chat_template else 0
print(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))
"""


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, function, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # it has printed why
        raise SystemExit(f"{function.__name__} failed") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()


def send_result(sender: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the parent too, which ends this process
    sender.send(function(*arguments))


class PeakMemory:
    """The peak of this process's resident memory since the start, above its memory at the start."""

    def __init__(self, interval: float = 0.01) -> None:
        self.interval = interval
        self.process = psutil.Process()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self.process.memory_info().rss
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stopped.wait(self.interval):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def peak_mb(self) -> float:
        return (self.peak - self.start) / 2**20


def show_bar_alone(trainer: Any) -> None:
    """Leaves the Trainer a progress bar without log lines, which would break it; they are in results.json."""
    from transformers import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Bar)


def generate_paragraph(checkpoint: Path, prompt: str) -> str:
    """What the checkpoint writes, loaded in a fresh process that finds no hf_mos on its path."""
    command = [sys.executable, "-c", RELOAD, str(checkpoint), prompt]
    with tempfile.TemporaryDirectory() as elsewhere:
        return subprocess.run(command, cwd=elsewhere, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def plot_losses(path: Path, title: str, xlabel: str, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """Draws training losses; each curve has its steps and its losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, (steps, losses) in curves.items():
        axes.plot(steps, losses, label=label)
    axes.set(xlabel=xlabel, ylabel="training loss, nats per token", title=title)
    axes.legend()
    figure.savefig(path, dpi=150)


def perplexity_for_card(perplexity: float) -> Any:
    """The `EvalResult` of a card: the perplexity of the held-out part of Python's documentation."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type="python-documentation",
        dataset_name=f"Docstrings and pydoc topics of Python {platform.python_version()}",
        dataset_split="validation",
        metric_type="perplexity",
        metric_name="perplexity per token",
        metric_value=round(perplexity, 2),
    )


def machine() -> str:
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def put_in_place(result: Path, out: Path) -> None:
    """Moves the finished folder to its name, and only then deletes a former one."""
    former = result.with_name("former")
    if out.exists():
        out.rename(former)
    result.rename(out)
    if former.exists():
        shutil.rmtree(former)
