"""What both comparisons of heads report: the table, the plot, the paragraphs and the finished folder."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

RESULTS_FILE = "results.json"

# Loads each checkpoint as a user does: without hf_mos, by the code beside the weights. The tokenizer needs no code.
RELOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
prompt, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = prompt
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    set_seed(0)
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9)
    start = inputs["input_ids"].shape[1] if tokenizer.chat_template else 0
    print(json.dumps(tokenizer.decode(tokens[0, start:], skip_special_tokens=True).strip()))
"""


def show_bar_alone(trainer: Any) -> None:
    """Leaves the Trainer a progress bar without log lines, which would break it; they are in results.json."""
    from transformers import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Bar)


def generate_paragraphs(checkpoints: list[Path], prompt: str) -> list[str]:
    """What each checkpoint writes, loaded in one fresh process that does not import hf_mos."""
    command = [sys.executable, "-c", RELOAD, prompt, *map(str, checkpoints)]
    with tempfile.TemporaryDirectory() as elsewhere:
        printed = subprocess.run(command, cwd=elsewhere, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in printed.splitlines()[-len(checkpoints) :]]


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


def perplexity_for_card(perplexity: float, text: str) -> Any:
    """The `EvalResult` of a card: the perplexity of the held-out part of a text inside Python."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type="python-documentation",
        dataset_name=f"{text} of Python {platform.python_version()}",
        dataset_split="validation",
        metric_type="perplexity",
        metric_name="perplexity per token",
        metric_value=round(perplexity, 2),
    )


def command_line(settings: Any, arguments: argparse.Namespace) -> str:
    """The command that makes the comparison again."""
    options = [f"--steps {settings.steps}", f"--num-mixtures {settings.num_mixtures}", f"--seed {settings.seed}"]
    if arguments.max_documents:
        options.append(f"--max-documents {arguments.max_documents}")
    return " ".join(["python examples/quickstart/compare_heads.py", *["--tiny"] * arguments.tiny, *options])


def machine() -> str:
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def put_in_place(result: Path, out: Path) -> None:
    """Moves the finished folder to its name, and only then deletes a former one. Files of the user stay."""
    former = result.with_name("former")
    if out.exists():
        out.rename(former)
    result.rename(out)
    if former.exists():
        for path in former.iterdir():
            if not (out / path.name).exists():
                path.rename(out / path.name)
        shutil.rmtree(former)
