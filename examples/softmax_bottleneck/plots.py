"""The plots of the questions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

WIDTH, HEIGHT = 9, 4  # inches
DPI = 110


def color_of(name: str) -> str:
    """The colour of a head's family; softmaxes are grey."""
    families = {"softmax": "0.35", "contexts": "tab:green", "paper": "tab:orange", "M=": "tab:red"}
    return next((color for word, color in families.items() if word in name), "tab:blue")


def plot_costs(
    path: Path, title: str, rows: Sequence[dict[str, Any]], references: dict[str, float] | None = None
) -> None:
    """Perplexity against operations and against seconds, with the best of the softmaxes that cost as much or less.

    The references stand beside it in words, as they would need another scale.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("Top", "seconds"),
        ("operations of the training, 10^12", "seconds of the training, one thread"),
        strict=True,
    ):
        points = [(row[column], float(str(row["validation"]).split(" ")[0]), row["head"]) for row in rows]
        draw_frontier(axes, sorted(point for point in points if "softmax" in point[2]))
        for x, y, name in points:
            axes.plot(x, y, "o", color=color_of(name), markersize=5)
            axes.annotate(name.removeprefix("mixture "), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation perplexity")
    if references:
        beside = "\n".join(f"{name}: {perplexity:.1f}" for name, perplexity in references.items())
        figure.axes[0].annotate(beside, (0.02, 0.02), xycoords="axes fraction", fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def plot_curves(path: Path, title: str, curves: dict[str, Sequence[tuple[float, float]]]) -> None:
    """Validation loss against seconds of training, a line a head; the first points are cut off."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        style = "o--" if "," in name else "o-"  # dashed: on more tokens
        axes.plot(
            *zip(*points, strict=True), style, markersize=3, label=name, color="0.35" if "soft" in name else None
        )
    lowest = min(points[-1][1] for points in curves.values())
    highest = max(points[min(1, len(points) - 1)][1] for points in curves.values())
    axes.set(xlabel="seconds of the training, one thread", ylabel="validation, nats per token", title=title)
    axes.set_ylim(lowest - 0.02 * (highest - lowest) - 1e-6, highest + 1e-6)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


def draw_frontier(axes: Any, softmaxes: Sequence[tuple[float, float, str]]) -> None:
    best, xs, ys = float("inf"), [], []
    for x, y, _ in softmaxes:
        best = min(best, y)
        xs.append(x)
        ys.append(best)
    axes.step(xs, ys, where="post", color="0.35", linewidth=1, label="softmax")
    axes.axhline(best, color="0.35", linewidth=0.5, linestyle=":")


def plot_spectra(path: Path, bound: int, spectra: dict[str, Sequence[Sequence[float]]]) -> None:
    """Singular values, largest first, as shares of the largest."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    for name, values in spectra.items():
        index, value = zip(*values, strict=True)
        style = "--" if "contexts" in name else "-"
        axes.plot(index, value, style, label=name)
    axes.axvline(bound, color="0.35", linewidth=0.8, linestyle=":")
    axes.annotate("hidden size + 1", (bound, 1e-1), xytext=(4, 0), textcoords="offset points", fontsize=8)
    axes.set(
        yscale="log",
        ylim=(1e-16, 2),
        xlabel="singular value, in order",
        ylabel="share of the largest",
        title="Singular values of the log-probability matrix",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


def plot_synthetic(path: Path, title: str, hidden_size: int, points: dict[str, Sequence[tuple[int, float]]]) -> None:
    """Excess over the entropy of the language against its rank."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    for name, values in points.items():
        axes.plot(*zip(*values, strict=True), "o-", label=name)
    axes.axvline(hidden_size, color="0.35", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="rank of the language", ylabel="nats per token above its entropy", title=title)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


def plot_gain(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The cost at which the mixture breaks even, and its cost, against the hidden size."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [row["D"] for row in rows]
    left.plot(sizes, [row["gain, nats"] for row in rows], "o-", label="the mixture of 4, at the same steps")
    left.plot(
        sizes, [row["doubling, nats"] for row in rows], "o-", color="0.35", label="the softmax, at twice the steps"
    )
    left.axhline(0, color="0.35", linewidth=0.5)
    left.set(xscale="log", xlabel="hidden size", ylabel="gain, nats per token")
    right.plot(sizes, [row["break-even cost"] for row in rows], "o-", label="break-even")
    right.plot(sizes, [row["cost, operations"] for row in rows], "o--", label="operations")
    right.plot(sizes, [row["cost, seconds"] for row in rows], "o--", label="seconds")
    right.set(xscale="log", xlabel="hidden size", ylabel="cost of the mixture, in softmaxes")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


def plot_learning_rates(path: Path, found: dict[tuple[int, str], Sequence[tuple[float, float]]]) -> None:
    """Perplexity against the learning rate, one panel for each width, one line for each head."""
    widths = list(dict.fromkeys(width for width, _ in found))
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    for axes, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        lines = {name: points for (each, name), points in found.items() if each == width}
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), "o-", label=name, color="0.35" if name == "softmax" else None)
        best = [min(value for _, value in points) for points in lines.values()]
        axes.set(xscale="log", xlabel="learning rate of all parameters", title=f"D = {width}")
        axes.set_ylim(min(best) * 0.99, max(best) * 1.06)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation perplexity")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=DPI)
