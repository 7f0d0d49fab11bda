"""Is each default of the mixture's options the best one? One option changed at a time in the full mixture of 4.

    python examples/softmax_bottleneck/defaults.py --quick
    python examples/softmax_bottleneck/defaults.py --data-dir ptb

Each variant is put on the same softmax model, which was trained until its validation loss no longer fell, and is
fine-tuned for the same steps with one learning rate for all weights. A difference below the spread of the seeds is
none.
"""

from typing import Annotated

import typer
from experiment import Experiment
from models import SOFTMAX, Head, Size, mixture, paper
from results import DEFAULT_OUT, Out, Quick, Results, Seeds, perplexities, show, spread, start
from text import Source, VocabSize, Words, load_text, with_source
from training import checkpoint_recipe

VARIANTS: dict[str, Head] = {
    "one softmax": SOFTMAX,
    "num_mixtures=4": mixture(4),
    "num_mixtures=16, shortlist_size=64": mixture(16, shortlist_size=64),
    "num_mixtures=2": mixture(2),
    "num_mixtures=8": mixture(8),
    "latent_scale=1": mixture(4, latent_scale=1.0),
    "a third of latent_scale": mixture(4, latent_scale=3.3),
    "three times latent_scale": mixture(4, latent_scale=30.0),
    "a third of the prior's spread": Head("mixture", {"num_mixtures": 4}, prior_spread=1 / 3),
    "three times the prior's spread": Head("mixture", {"num_mixtures": 4}, prior_spread=3),
    "dropout of 0.1 on the shifts": Head("dropout", {"num_mixtures": 4}),
    "the paper's latents, with tanh": paper(4),
}
QUICK = ["one softmax", "num_mixtures=4", "num_mixtures=2", "the paper's latents, with tanh"]


@with_source
def main(
    source: Source,
    vocab_size: VocabSize = 2048,
    words: Words = False,
    hidden_size: int = 32,
    num_layers: int = 2,
    checkpoint_steps: Annotated[
        int, typer.Option(help="Steps of the softmax model that all runs start from, at most.")
    ] = 40000,
    steps: Annotated[int, typer.Option(help="Steps of each fine-tuning.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of all weights.")] = 1e-3,
    seeds: Seeds = 1,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    if quick:
        vocab_size, hidden_size, num_layers, checkpoint_steps, steps, seeds = 512, 16, 1, 600, 60, 1
    text = load_text(source, vocab_size, words)
    results = Results(out, "defaults", quick)
    recipe = checkpoint_recipe(checkpoint_steps)
    start_of_all = Experiment(text, Size(hidden_size, num_layers), recipe, results).from_checkpoint()
    base = start_of_all.with_recipe(steps=steps, learning_rate=learning_rate, to_convergence=False)
    chosen = QUICK if quick else list(VARIANTS)
    runs: dict[str, list[dict]] = {name: [] for name in chosen}
    for name in chosen:
        for seed in range(seeds):
            runs[name].append(base.train(VARIANTS[name], seed))
    rows = [
        {
            "one change": name,
            "validation": spread(perplexities(runs[name]), 2),
            "test": spread(perplexities(runs[name], "test"), 2),
        }
        for name in chosen
    ]
    show(f"Fine-tuned on {text.name}, {steps} steps, perplexity, {seeds} seeds", rows)


if __name__ == "__main__":
    typer.run(main)
