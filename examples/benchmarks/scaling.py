"""Time and memory of the loss along each axis: tokens, mixtures and classes. Draws a plot.

    python examples/benchmarks/scaling.py --out scaling.png
    python examples/benchmarks/scaling.py --quick

Each point is a run of loss.py in a fresh process. Needs: pip install '.[examples]'.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from measure import report
from rich.console import Console
from rich.progress import track

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = ("mos_cross_entropy", "mos_cross_entropy, shortlist", "log_space_autograd")
AXES: dict[str, list[int]] = {
    "num_tokens": [128, 512, 2048, 8192],
    "num_mixtures": [1, 2, 4, 8, 16],
    "vocab_size": [8000, 32000, 128000, 262144],
}
QUICK = {"num_tokens": [64, 256], "num_mixtures": [2, 4], "vocab_size": [2000, 8000]}
LARGEST_FOR_AUTOGRAD = 2**31  # bytes of one (N, K, V) tensor; it makes several


def run(settings: dict[str, int], rounds: int, threads: int) -> list[dict[str, Any]]:
    fits = 4 * settings["num_tokens"] * settings["num_mixtures"] * settings["vocab_size"] <= LARGEST_FOR_AUTOGRAD / 4
    command = [sys.executable, str(Path(__file__).with_name("loss.py")), "--json", "--no-floor"]
    for name in NAMES if fits else NAMES[:2]:
        command += ["--only", name]
    for key, value in {**settings, "rounds": rounds, "threads": threads}.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
    return json.loads(result.stdout)["rows"]


def main(
    out: Path = Path("scaling.png"),
    hidden_size: int = 256,
    rounds: int = 3,
    threads: int = 2,
    quick: Annotated[bool, typer.Option(help="Use small sizes, for a quick look.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    base = {"num_tokens": 256, "num_mixtures": 4, "hidden_size": hidden_size, "vocab_size": 32000}
    if quick:
        base["vocab_size"] = 4000
    rows = []
    axes = QUICK if quick else AXES
    points = [(axis, value) for axis, values in axes.items() for value in values]
    for axis, value in track(points, "points of the plot", console=Console(stderr=True), transient=True):
        for row in run(base | {axis: value}, rounds, threads):
            rows.append({"axis": axis, "value": value, "loss": row[""]} | {k: row[k] for k in ("seconds", "extra MB")})
    plot(rows, list(axes), out)
    report(f"Scaling of the loss, around {base}; plot in {out}", rows, base, json_)


def plot(rows: list[dict[str, Any]], axes: list[str], out: Path) -> None:
    figure, panels = plt.subplots(2, len(axes), figsize=(4 * len(axes), 6.5), layout="constrained", squeeze=False)
    for column, axis in enumerate(axes):
        for panel, quantity in zip(panels[:, column], ("seconds", "extra MB"), strict=True):
            for name in NAMES:
                points = [(r["value"], r[quantity]) for r in rows if r["axis"] == axis and r["loss"] == name]
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=quantity)
            panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    partial = out.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.replace(out)


if __name__ == "__main__":
    typer.run(main)
