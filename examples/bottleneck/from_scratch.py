"""Does the mixture predict better than a softmax that spends as much? Trained from scratch, against fair controls.

    python examples/bottleneck/from_scratch.py --quick
    python examples/bottleneck/from_scratch.py --data-dir ptb --words --hidden-size 64

The same backbone, data, order, steps and schedule for every head, the learning rate searched for each family of heads.
The controls: one softmax; a latent before it (K = 1); a mixture of contexts; a softmax model widened until it spends
the operations of the mixture of 4; and softmaxes that are trained for the seconds of the mixture of 4. First for a
fixed number of steps, then the main ones until their validation loss no longer falls.
"""

from dataclasses import replace
from typing import Annotated, Any

import typer
from experiment import Configurations, Experiment, train_all
from models import SOFTMAX, Head, Size, contexts, mixture
from plots import plot_costs
from results import DEFAULT_OUT, Out, Quick, Results, mean, perplexities, show, spread, start
from text import (
    DataDir,
    DatasetConfigName,
    DatasetName,
    Source,
    TrainFile,
    ValidationFile,
    VocabSize,
    Words,
    load_text,
)
from training import from_scratch_recipe

MIXTURE = mixture(4)  # whose cost the controls spend
# Each family with the head that its learning rate is searched with.
FAMILIES: dict[str, tuple[Head, list[Head]]] = {
    "softmax": (SOFTMAX, [SOFTMAX]),
    "one latent": (mixture(1), [mixture(1)]),
    "contexts": (contexts(4), [contexts(4)]),
    "identity": (MIXTURE, [mixture(2), MIXTURE, mixture(8), mixture(15)]),
    "tanh": (mixture(4, latent_activation="tanh"), [mixture(4, latent_activation="tanh")]),
    "subspace": (
        mixture(4, latent_rank=16),
        [mixture(K, latent_rank=R) for K, R in ((4, 16), (4, 32), (8, 16))],
    ),
}
CONVERGENCE = ["softmax", "mixture K=4", "widened softmax", "mixture K=1"]
# Three tries for each family. Latents that start at the identity may want lower rates than the embeddings.
SOFTMAX_RATES = [{"learning_rate": rate} for rate in (2e-3, 5e-3, 1e-2)]
MIXTURE_RATES = [
    {"learning_rate": rate, "head_learning_rate": head_rate}
    for rate, head_rate in ((2e-3, 2e-3), (5e-3, 5e-4), (5e-3, 5e-3))
]


def configurations(base: Experiment, quick: bool) -> Configurations:
    """Every head with its recipe, and the widened softmax."""
    tries = slice(1, 2) if quick else slice(None)
    found: Configurations = {}
    for family, (searched, heads) in FAMILIES.items():
        if quick and family not in ("softmax", "contexts", "identity"):
            continue
        tuned = base.tuned(searched, (SOFTMAX_RATES if family == "softmax" else MIXTURE_RATES)[tries])
        found |= {head.name: (tuned, head) for head in ([searched] if quick else heads)}
    widened = base.widened(SOFTMAX, base.operations(MIXTURE))
    found["widened softmax"] = (widened.tuned(SOFTMAX, SOFTMAX_RATES[tries]), SOFTMAX)
    return found


def for_the_seconds_of_the_mixture(found: Configurations, seconds: dict[str, float]) -> Configurations:
    """The softmaxes, trained for more steps."""
    longer: Configurations = {}
    for name in ("softmax", "widened softmax"):
        experiment, head = found[name]
        steps = round(experiment.recipe.steps * seconds[MIXTURE.name] / seconds[name])
        longer[f"{name}, {steps} steps"] = (experiment.with_recipe(steps=steps), head)
    return longer


def row(
    name: str, experiment: Experiment, head: Head, results: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    steps = mean(results, "steps")
    tokens = steps * experiment.batch.numel()
    operations = experiment.operations(head)
    return {
        "head": name,
        "hidden size": experiment.size.hidden_size,
        "parameters": f"{results[0]['parameters']:,}",
        "Mop per token": round(operations / 1e6, 2),
        "µs per token": round(seconds * 1e6, 1),
        "steps": round(steps),
        "Top": round(tokens * operations / 1e12, 2),
        "seconds": round(tokens * seconds, 1),
        "seeds": len(results),
        "validation": spread(perplexities(results)),
        "test": spread(perplexities(results, "test")),
    }


def main(
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    dataset_name: DatasetName = None,
    dataset_config_name: DatasetConfigName = None,
    vocab_size: VocabSize = 2048,
    words: Words = False,
    hidden_size: int = 32,
    num_layers: int = 2,
    steps: Annotated[int, typer.Option(help="Of the comparison at a fixed number of steps.")] = 600,
    max_steps: Annotated[int, typer.Option(help="Of the training to convergence.")] = 16000,
    seeds: Annotated[int, typer.Option(help="Runs of each head at a fixed number of steps.")] = 3,
    convergence_seeds: Annotated[int, typer.Option(help="Runs of each head to convergence.")] = 3,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    if quick:
        vocab_size, hidden_size, num_layers, steps, max_steps, seeds, convergence_seeds = 512, 16, 1, 100, 400, 1, 1
    text = load_text(
        Source(data_dir, train_file, validation_file, dataset_name, dataset_config_name), vocab_size, words
    )
    base = Experiment(
        text, Size(hidden_size, num_layers), from_scratch_recipe(steps, 1e-2), Results(out, "from_scratch", quick)
    )
    found = configurations(base, quick)
    seconds = base.seconds(found, rounds=3 if quick else 7)
    if seeds:
        rows = compare(found | for_the_seconds_of_the_mixture(found, seconds), seconds, seeds)
        show(f"From scratch on {text.name}, perplexity at a fixed number of steps", rows)
        plot_costs(base.results.path.with_suffix(".png"), f"From scratch on {text.name}", rows)
    if convergence_seeds:
        results = Results(out, "from_scratch_to_convergence", quick)
        changes = {
            "steps": max_steps,
            "warmup": 0.05,
            "to_convergence": True,
            "evaluate_every": max(20, max_steps // 40),
        }
        converged = {
            name: (replace(found[name][0].with_recipe(**changes), results=results), found[name][1])
            for name in CONVERGENCE
            if name in found
        }
        rows = compare(converged, seconds, convergence_seeds)
        show(f"From scratch on {text.name}, perplexity at convergence", rows)


def compare(found: Configurations, seconds: dict[str, float], seeds: int) -> list[dict[str, Any]]:
    runs = train_all(found, seeds)
    return [row(name, *found[name], runs[name], seconds[name.split(",")[0]]) for name in found]


if __name__ == "__main__":
    typer.run(main)
