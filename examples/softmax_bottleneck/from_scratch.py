"""Does a mixture pay in training from scratch, with so much text that nothing overfits?

    python examples/softmax_bottleneck/debian_documentation.py debian-docs
    python examples/softmax_bottleneck/from_scratch.py --dataset-name debian-docs
    python examples/softmax_bottleneck/from_scratch.py --dataset-name debian-docs --report

Llamas of four layers, whose decoder is tied to the embedding, read each token once. All heads have the same backbone,
batches, steps and schedule, and the loss of this library; each tries every learning rate. The controls are one softmax
(`softmax`), one softmax of a trained latent (`mixture K=1`), and one softmax with all weights of a mixture
(`contexts K=16`). The scale of a head is that of a model made from a config, unless its name says another.
`--longer 1.2` also trains the softmax on 1.2 times the tokens, for the seconds of a dearer head.

Each run is kept in `from_scratch.json` in `--out` when it ends, and runs once. An interrupted run goes on from the
last point of its curve. `--report` only reads the file.
"""

import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from experiment import Experiment
from models import SOFTMAX, Head, LlamaSize, heads_named
from plots import plot_curves
from results import DEFAULT_OUT, Out, Quick, Results, mean, show, spread, start
from text import SPLITS, Source, Text, load_text, with_source
from training import Recipe
from transformers import AutoTokenizer

from hf_mos.remote_code.configuration_mos import default_scale

NUM_LAYERS, HEAD_SIZE = 4, 32
BLOCK_SIZE, BLOCKS_PER_STEP = 128, 16
VALID_BLOCKS = 512  # and as many to test
POINTS = 8  # of a curve
RATES = [1e-3, 2e-3, 4e-3, 8e-3]
HEADS = [
    "softmax",
    "mixture K=1",
    "contexts K=16",
    "mixture K=4",
    "mixture K=16 M=64",
    "mixture K=16 M=256",
]


def kept_text(source: Source, vocab_size: int, valid_blocks: int, out: Path) -> Text:
    """The text in tokens, which are made once and kept in `out`, by the bytes of the text.

    The digest is a part of the name, as Debian updates its packages, and runs on two texts cannot be compared.
    """
    texts = source.texts()
    digest = hashlib.sha256()
    for split in SPLITS:
        for text in texts[split]:
            digest.update(text.encode() + b"\0")
    name = f"{source.name} {digest.hexdigest()[:8]}"
    folder = out / "tokens" / f"{name.replace(' ', '-')}-{vocab_size}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = load_text(source, vocab_size, block_size=BLOCK_SIZE, max_valid_blocks=valid_blocks)
        assert made.tokenizer is not None
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            staged = Path(work, "tokens")
            made.tokenizer.save_pretrained(staged)
            torch.save({split: getattr(made, split) for split in SPLITS}, staged / "blocks.pt")
            os.rename(staged, folder)
    blocks = torch.load(folder / "blocks.pt", mmap=True)
    return Text(name, vocab_size, **blocks, tokenizer=AutoTokenizer.from_pretrained(folder))


def experiment_of(text: Text, width: int, tokens: int, results: Results) -> Experiment:
    """The experiment that reads the first `tokens` tokens once."""
    steps = tokens // (BLOCK_SIZE * BLOCKS_PER_STEP)
    if steps * BLOCKS_PER_STEP > len(text.train):
        raise typer.BadParameter(f"--tokens: expected at most {text.train.numel():,}, given {tokens:,}")
    recipe = Recipe(steps, 0.0, batch_size=BLOCKS_PER_STEP, warmup=0.1, measure_every=max(1, steps // POINTS))
    size = LlamaSize(width, NUM_LAYERS, max(1, width // HEAD_SIZE))
    used = replace(text, train=text.train[: steps * BLOCKS_PER_STEP], tokenizer=None)
    return Experiment(used, size, recipe, results)


Contestants = dict[str, tuple[Experiment, Head]]  # by the name in the table


def contestants_of(
    text: Text, width: int, tokens: int, heads: list[Head], longer: list[float], results: Results
) -> Contestants:
    """The heads, and the softmax that reads more tokens, for the seconds of a dearer head."""
    found: Contestants = {}
    for head in heads:
        scale = {} if head == SOFTMAX else {"latent_scale": default_scale(width, from_scratch=True)}
        head = replace(head, options=scale | head.options)
        found[head.name] = (experiment_of(text, width, tokens, results), head)
    for times in longer:
        found[f"softmax, {tokens * times / 1e6:.1f} million tokens"] = (
            experiment_of(text, width, round(tokens * times), results),
            SOFTMAX,
        )
    return found


def kept_runs(experiment: Experiment, head: Head, rates: list[float], seeds: int) -> dict[float, list[dict[str, Any]]]:
    """The results that the file has, by learning rate."""
    runs = {}
    for rate in rates:
        tried = experiment.with_recipe(learning_rate=rate)
        runs[rate] = [run for seed in range(seeds) if (run := tried.kept(head, seed)) is not None]
    return {rate: found for rate, found in runs.items() if found}


def report(contestants: Contestants, rates: list[float], seeds: int, title: str, path: Path) -> None:
    """Prints what the file has of each contestant, at its best rate, and draws the curves."""
    rows, curves = [], {}
    for name, (experiment, head) in contestants.items():
        found = kept_runs(experiment, head, rates, seeds)
        if not found:
            continue
        best = min(found, key=lambda rate: mean(found[rate], "valid_nats"))
        runs = found[best]
        rows.append(
            {
                "head": name,
                "rate": f"{best:g}",
                "of rates": len(found),
                "seeds": len(runs),
                "parameters": f"{runs[0]['parameters']:,}",
                "seconds": round(mean(runs, "seconds")),
                "validation, nats": spread([run["valid_nats"] for run in runs], 4),
                "test, nats": spread([run["test_nats"] for run in runs], 4),
            }
        )
        last = (runs[0]["steps"], runs[0]["seconds"], runs[0]["valid_nats"])
        curves[name] = [point[1:3] for point in [*runs[0]["curve"], last]]
    if rows:
        show(title, rows)
        plot_curves(path, title, curves)


def train(contestants: Contestants, rates: list[float], seeds: int) -> None:
    """Seed after seed and rate after rate, so that what an interrupted command has can be compared."""
    for seed in range(seeds):
        for rate in rates:
            for experiment, head in contestants.values():
                experiment.with_recipe(learning_rate=rate).train(head, seed)


@with_source
def main(
    source: Source,
    vocab_size: Annotated[int, typer.Option(help="V, of the byte-level BPE tokenizer of the text.")] = 8192,
    hidden_size: Annotated[int, typer.Option(help="D of the Llama.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to train on, each once.")] = 20_000_000,
    heads: Annotated[list[str] | None, typer.Option(help=f"Heads by name, {', '.join(HEADS)} by default.")] = None,
    rates: Annotated[list[float] | None, typer.Option(help=f"Learning rates, {RATES} by default.")] = None,
    longer: Annotated[
        list[float] | None, typer.Option(help="Train the softmax on this many times the tokens too, such as 1.2.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each head at each rate, with seeds 0, 1, ...")] = 2,
    reports: Annotated[bool, typer.Option("--report", help="Train nothing: print what the file has.")] = False,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    if quick:
        vocab_size, hidden_size, tokens, seeds = 512, 32, 81_920, 1
        rates = rates or RATES[-1:]
    chosen = heads_named(heads or HEADS)
    results = Results(out, "from_scratch", quick)
    text = kept_text(source, vocab_size, 32 if quick else VALID_BLOCKS, out)
    contestants = contestants_of(text, hidden_size, tokens, chosen, longer or [], results)
    if not reports:
        train(contestants, rates or RATES, seeds)
    title = f"From scratch on {text.name}, D = {hidden_size}, V = {vocab_size}, {tokens / 1e6:.1f} million tokens"
    path = out / f"from_scratch-D{hidden_size}-V{vocab_size}-{tokens}{'-quick' if quick else ''}.png"
    report(contestants, rates or RATES, seeds, title, path)


if __name__ == "__main__":
    typer.run(main)
