"""Does one learning rate suit the softmax and the mixture, at every width?

    python examples/softmax_bottleneck/learning_rates.py --quick
    python examples/softmax_bottleneck/learning_rates.py --data-dir ptb
    python examples/softmax_bottleneck/learning_rates.py --train-file test.txt --validation-file valid.txt \\
        --model smol/SmolLM2-135M-Instruct

From the same trained softmax model, the softmax and mixtures with several values of `latent_scale` are fine-tuned with
one learning rate for all their parameters, over a grid of rates. A scale is given as its product with the width D, so
that a row of the table is one rule for all widths; "1" is a scale of 1. The rule is right where the best rate of the
mixture is the best rate of the softmax. Products of the pretrained model are in bf16, by autocast.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from corpus import Corpus
from experiment import Experiment
from models import SOFTMAX, Head, Size, mixture
from plots import plot_learning_rates
from results import DEFAULT_OUT, Out, Quick, Results, perplexities, show, start
from text import Source, VocabSize, load_text, with_source
from training import Recipe, checkpoint_recipe
from transformers import AutoConfig, AutoTokenizer

from hf_mos.remote_code.configuration_mos import default_scale

SMALL_STEPS = 500
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
REAL_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
DEFAULT = default_scale(1)  # its product with the width
PRODUCTS = (DEFAULT / 10**0.5, DEFAULT, DEFAULT * 10**0.5)
REAL_STEPS, REAL_BATCH_SIZE = 40, 2  # blocks


def heads(width: int, products: tuple[float, ...]) -> dict[str, Head]:
    """The heads by their name in the table."""
    found = {"softmax": SOFTMAX}
    if width < DEFAULT:  # else a scale of 1 is no lower than the default
        found["mixture, scale 1"] = mixture(4, latent_scale=1.0)
    return found | {f"mixture, scale {p:.0f} / D": mixture(4, latent_scale=round(p / width, 4)) for p in products}


def perplexity(experiment: Experiment, head: Head, rate: float) -> float:
    """The perplexity after a training; infinite where the training diverged."""
    try:
        return perplexities([experiment.with_recipe(learning_rate=rate).train(head, 0)])[0]
    except FloatingPointError:
        return float("inf")


@with_source
def main(
    source: Source,
    vocab_size: VocabSize = 2048,
    widths: Annotated[
        str, typer.Option(help="Hidden sizes of the small models, with commas between them.")
    ] = "32,128",
    steps: Annotated[
        int | None, typer.Option(help=f"Steps of each fine-tuning: {SMALL_STEPS}, or {REAL_STEPS} with --model.")
    ] = None,
    checkpoint_steps: Annotated[int, typer.Option(help="Steps of each softmax model, at most.")] = 40000,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a pretrained model, in place of the small models.")
    ] = None,
    train_tokens: Annotated[int, typer.Option(help="With --model: tokens to train on, at most.")] = 300_000,
    valid_tokens: Annotated[int, typer.Option(help="With --model: tokens to validate on, at most.")] = 10_000,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start(threads)
    if quick:
        vocab_size, widths, steps, checkpoint_steps = 512, "16", steps or 40, 400
    results = Results(out, "learning_rates", quick)
    rates = REAL_RATES if model else RATES[3:] if quick else RATES
    starts = {}
    if model:
        config = AutoConfig.from_pretrained(model)
        text = Corpus.read(source, AutoTokenizer.from_pretrained(model), train_tokens, valid_tokens)
        steps = steps or REAL_STEPS
        recipe = Recipe(steps, learning_rate=0, batch_size=REAL_BATCH_SIZE, warmup=0.25)
        size = Size(config.hidden_size, config.num_hidden_layers)
        starts[config.hidden_size] = Experiment(text, size, recipe, results, model)
    else:
        steps = steps or SMALL_STEPS
        text = load_text(source, vocab_size)
        for width in map(int, widths.split(",")):
            # A wider model needs a lower rate.
            recipe = checkpoint_recipe(checkpoint_steps, learning_rate=2e-2 * (32 / max(width, 32)) ** 0.5)
            experiment = Experiment(text, Size(width, 2), recipe, results).from_checkpoint()
            starts[width] = replace(experiment, recipe=Recipe(steps, learning_rate=0))
    found = {}
    for width, experiment in starts.items():
        rows = []
        for name, head in heads(width, PRODUCTS).items():
            # The cache of autocast would not see a weight's update.
            with torch.autocast("cpu", torch.bfloat16, model is not None, cache_enabled=False):
                found[width, name] = [(rate, perplexity(experiment, head, rate)) for rate in rates]
            rows.append({"head": name} | {f"{rate:g}": f"{value:.2f}" for rate, value in found[width, name]})
        show(f"D = {width}, fine-tuned on {text.name}, {steps} steps, validation perplexity by learning rate", rows)
    name = "learning_rates" + "".join(f"-{width}" for width in starts)
    plot_learning_rates(out / f"{name}.png", found)


if __name__ == "__main__":
    typer.run(main)
