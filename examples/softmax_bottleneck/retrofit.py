"""Is a trained model better served by a mixture than by more training? Fine-tuned from the same converged checkpoint.

    python examples/softmax_bottleneck/retrofit.py --quick
    python examples/softmax_bottleneck/retrofit.py --data-dir ptb

A softmax model is trained until its validation loss no longer falls. From there its own head, the mixture of 4 and
mixtures in a shared subspace (`latent_rank` R) are fine-tuned for the same steps, on the same data in the same order,
with the same learning-rate search: the whole model, and the head alone. The old head is also trained for the seconds
of the mixtures, and the plot has perplexity against operations and against seconds with the softmax as the frontier.
"""

from typing import Annotated, Any

import typer
from experiment import Experiment
from models import SOFTMAX, Head, Size, mixture
from plots import plot_costs
from results import DEFAULT_OUT, Out, Quick, Results, Seeds, mean, perplexities, show, spread, start
from text import DataDir, DatasetConfigName, DatasetName, Source, TrainFile, ValidationFile, VocabSize, load_text
from training import Recipe

FULL, CHEAP = mixture(4), mixture(4, latent_rank=8)
GRID = [mixture(K, latent_rank=R) for K in (4, 8, 16) for R in (8, 16, 32)]
RATES = [{"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]
LONGER = [2, 4, 8]  # times the steps, for the old head

Configurations = dict[str, tuple[Experiment, Head]]


def configurations(base: Experiment, heads: list[Head], rates: list[dict[str, float]]) -> Configurations:
    """Each head with the learning rate of its family, and the old head trained for longer."""
    searched = {"softmax": base.tuned(SOFTMAX, rates), "full": base.tuned(FULL, rates), "R": base.tuned(CHEAP, rates)}
    found: Configurations = {"softmax": (searched["softmax"], SOFTMAX), FULL.name: (searched["full"], FULL)}
    found |= {head.name: (searched["R"], head) for head in heads}
    for factor in LONGER:
        found[f"softmax, {factor} x steps"] = (
            searched["softmax"].with_recipe(steps=factor * base.recipe.steps),
            SOFTMAX,
        )
    return found


def row(
    name: str, experiment: Experiment, head: Head, results: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    tokens = experiment.recipe.steps * experiment.batch.numel()
    operations = experiment.operations(head)
    return {
        "head": name,
        "learning rate": experiment.recipe.learning_rate,
        "µs per token": round(seconds * 1e6, 1),
        "Mop per token": round(operations / 1e6, 2),
        "steps": experiment.recipe.steps,
        "Top": round(tokens * operations / 1e12, 3),
        "seconds": round(tokens * seconds, 1),
        "validation": spread(perplexities(results), 2),
        "test": spread(perplexities(results, "test"), 2),
        "parameters": f"{mean(results, 'parameters'):,.0f}",
    }


def compare(
    title: str, base: Experiment, heads: list[Head], rates: list[dict[str, float]], seeds: int, rounds: int
) -> list[Any]:
    found = configurations(base, heads, rates)
    timed = {name: entry for name, entry in found.items() if "steps" not in name}
    seconds = base.seconds(timed, rounds)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
    for seed in range(seeds):
        for name, (experiment, head) in found.items():
            if seed == 0 or head in (SOFTMAX, FULL, CHEAP):
                runs[name].append(experiment.train(head, seed))
    rows = [row(name, *found[name], runs[name], seconds[name.split(",")[0]]) for name in found]
    show(f"{title}, {seeds} seeds (the grid: one)", rows)
    return rows


def main(
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    dataset_name: DatasetName = None,
    dataset_config_name: DatasetConfigName = None,
    vocab_size: VocabSize = 2048,
    hidden_size: int = 32,
    num_layers: int = 2,
    steps: Annotated[int, typer.Option(help="Of each fine-tuning.")] = 300,
    checkpoint_steps: Annotated[int, typer.Option(help="Of the checkpoint, at most.")] = 8000,
    seeds: Seeds = 3,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    rates, grid, rounds = RATES, GRID, 7
    if quick:
        vocab_size, hidden_size, num_layers, steps, checkpoint_steps, seeds = 512, 16, 1, 60, 600, 1
        rates, grid, rounds = RATES[1:2], [CHEAP], 2
    text = load_text(Source(data_dir, train_file, validation_file, dataset_name, dataset_config_name), vocab_size)
    recipe = Recipe(checkpoint_steps, 2e-2, to_convergence=True, evaluate_every=max(50, checkpoint_steps // 40))
    size, results = Size(hidden_size, num_layers), Results(out, "retrofit", quick)
    base = Experiment(text, size, recipe, results).from_checkpoint()
    checkpoint = base.checkpoint_result()
    print(
        f"The checkpoint: {checkpoint['steps']} steps, {checkpoint['seconds']:.0f} s, perplexity "
        f"{perplexities([checkpoint])[0]:.2f} (validation) and {perplexities([checkpoint], 'test')[0]:.2f} (test)"
    )
    full = base.with_recipe(steps=steps, to_convergence=False)
    rows = compare(f"The whole model on {text.name}, perplexity", full, grid, rates, seeds, rounds)
    plot_costs(results.path.with_suffix(".png"), f"Fine-tuned from the same checkpoint on {text.name}", rows)
    head_alone = full.with_recipe(train_backbone=False)
    compare(f"The head alone on {text.name}, perplexity", head_alone, [CHEAP], rates, seeds, rounds)


if __name__ == "__main__":
    typer.run(main)
