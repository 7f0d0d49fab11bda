"""Does the mixture predict better than a softmax that spends as much? Trained from scratch, against fair controls.

    python examples/softmax_bottleneck/until_convergence.py --quick
    python examples/softmax_bottleneck/until_convergence.py --data-dir ptb

The same backbone, data, order, steps and schedule for every head, the learning rate searched for each family of heads.
The controls: one softmax; a latent before it (K = 1); a mixture of contexts; the paper's latents; a softmax model
widened until it spends the operations of the mixture of 4; and softmaxes that are trained for the seconds of the
mixture of 4. First for a fixed number of steps, then until the validation loss no longer falls, where the softmax that
is trained for longer is one of more patience, and so is a mixture beside it.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import typer
from experiment import Configurations, Experiment, train_all
from models import SOFTMAX, Head, Size, contexts, mixture, paper
from plots import plot_costs
from results import DEFAULT_OUT, Out, Quick, Results, mean, perplexities, show, spread, start
from text import Source, VocabSize, Words, load_text, with_source
from training import convergence_recipe, from_scratch_recipe, new_latents_rate

MIXTURE = mixture(4)  # whose cost the controls spend
WIDENED = "widened softmax"


@dataclass(frozen=True)
class Family:
    """Heads that share a learning rate: the best one for the head that it is searched with."""

    searched: Head
    heads: list[Head]


PAPER = Family(paper(4), [paper(K) for K in (2, 4, 8, 15)])
FIXED_STEPS = [
    Family(SOFTMAX, [SOFTMAX]),
    Family(mixture(1), [mixture(1)]),
    Family(contexts(4), [contexts(4)]),
    Family(MIXTURE, [mixture(K) for K in (2, 4, 8, 15)]),
    PAPER,
]
CONVERGENCE = [
    Family(SOFTMAX, [SOFTMAX]),
    Family(MIXTURE, [mixture(1), contexts(4), *(mixture(K) for K in (2, 4, 8, 15))]),
    PAPER,
]
# The same for every head: where one may try a higher rate than another, so few steps rank them by their rates.
FIXED_STEPS_RATES = [1e-2, 2e-2, 4e-2, 8e-2]
CONVERGENCE_RATES = [5e-3, 1e-2]
# Trained beyond their convergence: the softmax towards the mixture's seconds, and the mixture as long as the softmax.
PATIENT = [(SOFTMAX, 4), (SOFTMAX, 8), (MIXTURE, 8)]


def check_heads(given: list[str], families: list[Family]) -> None:
    names = [*(head.name for family in families for head in family.heads), WIDENED]
    if unknown := [name for name in given if name not in names]:
        raise typer.BadParameter(f"--heads: expected some of {', '.join(names)}, given {', '.join(unknown)}")


def configurations(
    base: Experiment, families: list[Family], rates: list[float], only: list[str], quick: bool
) -> Configurations:
    """The requested heads with their recipes, and the widened softmax."""
    tried = rates[:1] if quick else rates
    found: Configurations = {}
    for family in families:
        heads = [family.searched] if quick and not only else family.heads
        if chosen := [head for head in heads if not only or head.name in only]:
            tuned = base.tuned(family.searched, rates_to_try(family.searched, tried))
            found |= {head.name: (tuned, head) for head in chosen}
    if not only or WIDENED in only:
        widened = base.widened(SOFTMAX, base.operations(MIXTURE))
        found[WIDENED] = (widened.tuned(SOFTMAX, rates_to_try(SOFTMAX, tried)), SOFTMAX)
    return found


def rates_to_try(head: Head, rates: list[float]) -> list[dict[str, float]]:
    if head == SOFTMAX:
        return [{"learning_rate": rate} for rate in rates]
    return [{"learning_rate": rate, "head_learning_rate": new_latents_rate(rate)} for rate in rates]


def for_the_seconds_of_the_mixture(found: Configurations, seconds: dict[str, float]) -> Configurations:
    """The softmaxes, trained for the seconds of the mixture."""
    longer: Configurations = {}
    controls = [name for name in (SOFTMAX.name, WIDENED) if name in found and MIXTURE.name in found]
    for name in controls:
        experiment, head = found[name]
        steps = round(experiment.recipe.steps * seconds[MIXTURE.name] / seconds[name])
        longer[f"{name}, {steps} steps"] = (experiment.with_recipe(steps=steps), head)
    return longer


def of_more_patience(found: Configurations) -> Configurations:
    """The heads whose learning rates are cut later."""
    longer: Configurations = {}
    for head, patience in PATIENT:
        if head.name in found:
            experiment, _ = found[head.name]
            longer[f"{head.name}, patience {patience}"] = (experiment.with_recipe(patience=patience), head)
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


@with_source
def main(
    source: Source,
    vocab_size: VocabSize = 2048,
    words: Words = False,
    hidden_size: int = 32,
    num_layers: int = 2,
    steps: Annotated[int, typer.Option(help="Steps of the comparison at a fixed number of steps.")] = 1000,
    learning_rates: Annotated[
        list[float] | None,
        typer.Option(help="Learning rates to try for a fixed number of steps; give it several times."),
    ] = None,
    max_steps: Annotated[int, typer.Option(help="Steps of a training to convergence, at most.")] = 40000,
    seeds: Annotated[int, typer.Option(help="Runs of each head at a fixed number of steps.")] = 3,
    convergence_seeds: Annotated[int, typer.Option(help="Runs of each head to convergence.")] = 3,
    heads: Annotated[list[str] | None, typer.Option(help="Run only these heads; the tables have their names.")] = None,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    for families in ([FIXED_STEPS] if seeds else []) + ([CONVERGENCE] if convergence_seeds else []):
        check_heads(heads or [], families)
    if quick:
        vocab_size, hidden_size, num_layers, steps, max_steps = 512, 16, 1, 100, 800
        seeds, convergence_seeds = min(seeds, 1), min(convergence_seeds, 1)
    text = load_text(source, vocab_size, words)
    size, only, rounds = Size(hidden_size, num_layers), heads or [], 2 if quick else 7
    if seeds:
        base = Experiment(text, size, from_scratch_recipe(steps, 1e-2), Results(out, "fixed_steps", quick))
        found = configurations(base, FIXED_STEPS, learning_rates or FIXED_STEPS_RATES, only, quick)
        seconds = base.seconds(found, rounds)
        longer = for_the_seconds_of_the_mixture(found, seconds)
        report(base, found | longer, seconds, seeds, f"{steps} steps")
    if convergence_seeds:
        results = Results(out, "until_convergence", quick)
        base = Experiment(text, size, convergence_recipe(max_steps, 1e-2), results)
        found = configurations(base, CONVERGENCE, CONVERGENCE_RATES, only, quick)
        seconds = base.seconds(found, rounds)
        longer = of_more_patience(found)
        report(base, found | longer, seconds, convergence_seeds, f"to convergence, {max_steps} steps at most")


def report(base: Experiment, found: Configurations, seconds: dict[str, float], seeds: int, steps: str) -> None:
    runs = train_all(found, seeds)
    rows = [row(name, *found[name], runs[name], seconds[name.split(",")[0]]) for name in found]
    title = f"From scratch on {base.text.name}, {steps}"
    show(f"{title}, perplexity", rows)
    plot_costs(base.results.path.with_suffix(".png"), title, rows)


if __name__ == "__main__":
    typer.run(main)
