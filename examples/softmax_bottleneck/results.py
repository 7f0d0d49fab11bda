"""Keeps the runs of a question in one JSON file. Each run is written when it ends, and runs once."""

import hashlib
import json
import math
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from hf_mos.tools.places import write_whole
from hf_mos.tools.provenance import processor

# Flags that all questions have.
Out = Annotated[Path, typer.Option(help="Folder of the JSON of every run and of the plots.")]
Quick = Annotated[bool, typer.Option("--quick", help="A smaller version of the question, in two minutes.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each configuration, with seeds 0, 1, ...")]
DEFAULT_OUT = Path("softmax-bottleneck-out")


class Results:
    """The JSON file of a question; an interrupted script continues from it."""

    def __init__(self, out: Path, question: str, quick: bool = False) -> None:
        self.path = out / f"{question}{'-quick' if quick else ''}.json"
        self.runs: list[dict[str, Any]] = []
        if self.path.exists():
            self.runs = json.loads(self.path.read_text(encoding="utf-8"))["runs"]

    def run(self, settings: dict[str, Any], function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of the run with these settings: from the file, or by a call of the function."""
        if (kept := self.find(settings)) is not None:
            return kept
        settings = as_in_file(settings)
        self.runs.append({"settings": settings, "result": function(), "command": command(), "versions": versions()})
        self.write()
        return self.runs[-1]["result"]

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result of the run with these settings that the file has."""
        settings = as_in_file(settings)
        return next((run["result"] for run in self.runs if run["settings"] == settings), None)

    def unfinished(self, settings: dict[str, Any]) -> Path:
        """The file for the state of the run with these settings while it is under way."""
        return self.path.parent / "unfinished" / f"{digest(settings)}.pt"

    def write(self) -> None:
        """Writes the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        write_whole(self.path, lambda file: file.write_text(f'{{"runs": [\n{lines}\n]}}\n', encoding="utf-8"))


def as_in_file(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def digest(settings: dict[str, Any]) -> str:
    """Eight digits that tell settings apart."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def command() -> str:
    """The command line; a path is reduced to its last name."""
    arguments = [Path(argument).name if Path(argument).exists() else argument for argument in sys.argv[1:]]
    return shlex.join(["python", f"examples/softmax_bottleneck/{Path(sys.argv[0]).name}", *arguments])


def versions() -> dict[str, str]:
    """The versions of Python, libraries and, in a repository, the commit; the processor, as seconds depend on it."""
    found = {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    if shutil.which("git") and not (commit := subprocess.run(git, capture_output=True, text=True)).returncode:
        found["commit"] = commit.stdout.strip()
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and the standard deviation if there are several values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def perplexities(results: Sequence[dict[str, Any]], split: str = "valid") -> list[float]:
    return [math.exp(result[f"{split}_nats"]) for result in results]


def mean(results: Sequence[dict[str, Any]], field: str) -> float:
    return statistics.mean(result[field] for result in results)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints a table in Markdown."""
    print(f"\n{title}\n")
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * (len(columns) - 1))
    for row in rows:
        print(
            "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()) + " |"
        )


def start(threads: int = 1) -> None:
    """One thread, so that the seconds of a run are those of its own work; and a quiet transformers."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
