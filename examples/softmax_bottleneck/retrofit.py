"""Is a trained model better served by a mixture than by more training? Fine-tuned from the same converged checkpoint.

    python examples/softmax_bottleneck/retrofit.py --quick
    python examples/softmax_bottleneck/retrofit.py --data-dir ptb
    python examples/softmax_bottleneck/retrofit.py --data-dir ptb --shortlists
    python examples/softmax_bottleneck/retrofit.py --data-dir ptb --shortlists --heads 'mixture K=16 shift_rank=8'

A softmax model is trained until its validation loss no longer falls. From there its own head and the mixture of 4 are
fine-tuned for the same steps, on the same data in the same order, with the same learning-rate search: the whole model,
then the head alone. The old head is also trained for the seconds of the mixture and more. The controls are a latent
before the softmax (K = 1) and a mixture of contexts. The plot has perplexity against operations and against seconds
with the softmax as the frontier, and in words two models that are trained from scratch as the checkpoint was: a
softmax that is widened until it spends the operations of the mixture of 4, and the mixture of 4.

With `--shortlists` the table is of mixtures on a shortlist (`shortlist_size` M): which share of the gain they keep.
Their controls are one softmax whose likeliest classes a second latent scores again, and a mixture of contexts with as
many parameters.
"""

import statistics
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from experiment import Configurations, Experiment, train_all
from models import LIKELY, SOFTMAX, Head, Size, contexts, heads_named, mixture, rescored
from plots import plot_costs
from results import DEFAULT_OUT, Out, Quick, Results, Seeds, mean, perplexities, show, spread, start
from text import Source, VocabSize, Words, load_text, with_source
from training import checkpoint_recipe

FULL = mixture(4)
# A latent alone, and mixed before one softmax: what is gained by them is not gained by mixing softmaxes.
CONTROLS = [mixture(1), contexts(4)]
# The first is one softmax, and the control of the others.
SHORTLISTS = [
    rescored(64),
    *(mixture(K, shortlist_size=M) for K in (4, 16) for M in (16, 64, 256)),
]
# One run each, at the last rate of the others: half of the vocabulary takes more seconds than all of it.
LONG_SHORTLISTS = [mixture(K, shortlist_size=1024) for K in (4, 16)]
# Other rules that choose a shortlist.
CHOSEN = [
    Head(kind, {"num_mixtures": 4, "shortlist_size": M})
    for kind, M in (("own tokens too", 64), (f"classes above {LIKELY:g}", 256))
]
RATES = [{"learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2)]  # tried for each head
LONGER = [2, 4]  # times the steps, for the old head
WIDE_RATE, SCRATCH_HEAD_RATE = 1e-2, 5e-3  # from scratch: of the widened softmax; of the mixture's prior and shifts


def configurations(base: Experiment, heads: list[Head], tries: slice) -> Configurations:
    """The softmax, the softmax trained for longer, and the other heads, each with its best learning rates."""
    found: Configurations = {head.name: (base.tuned(head, RATES[tries]), head) for head in (SOFTMAX, *heads)}
    for factor in LONGER:
        longer = base.with_recipe(steps=factor * base.recipe.steps)
        found[f"softmax, {factor} x steps"] = (longer.tuned(SOFTMAX, RATES[tries]), SOFTMAX)
    return found


def row(
    name: str, experiment: Experiment, head: Head, results: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    tokens = experiment.recipe.steps * experiment.batch.numel()
    operations = experiment.operations(head)
    return {
        "head": name,
        "rate": f"{experiment.recipe.learning_rate:g}",
        "µs per token": round(seconds * 1e6, 1),
        "Mop per token": round(operations / 1e6, 2),
        "steps": experiment.recipe.steps,
        "Top": round(tokens * operations / 1e12, 3),
        "seconds": round(tokens * seconds, 1),
        "seeds": len(results),
        "validation": spread(perplexities(results), 2),
        "test": spread(perplexities(results, "test"), 2),
        "parameters": f"{mean(results, 'parameters'):,.0f}",
    }


def compare(found: Configurations, seconds: dict[str, float], seeds: int) -> list[dict[str, Any]]:
    runs = train_all(found, seeds)
    return [row(name, *found[name], runs[name], seconds[name.split(",")[0]]) for name in found]


def compare_shortlists(
    base: Experiment, heads: list[Head], long_heads: list[Head], tries: slice, rounds: int, seeds: int
) -> None:
    """Shows which share of the gain of the mixture of 4 each head keeps, and at what cost."""
    found = configurations(base, [FULL, *heads], tries)
    best = found[heads[-1].name][0]
    long = {head.name: (best, head) for head in long_heads if base.text.vocab_size > 1024}
    timed = {name: entry for name, entry in (found | long).items() if "steps" not in name}
    seconds = base.seconds(timed, rounds)
    runs = train_all(found, seeds) | train_all(long, 1)
    perplexity = {name: statistics.mean(perplexities(results)) for name, results in runs.items()}
    gain = {name: perplexity[SOFTMAX.name] - each for name, each in perplexity.items()}
    rows = [
        row(name, *entry, runs[name], seconds[name.split(",")[0]])
        | {"share of the gain": f"{gain[name] / gain[FULL.name]:.2f}"}
        for name, entry in (found | long).items()
    ]
    show(f"On a shortlist, the whole model on {base.text.name}, perplexity", rows)
    model = base.model(SOFTMAX)
    with torch.no_grad():
        likely = model.eval()(base.text.valid[:64]).logits.exp() > LIKELY
    print(f"\nOf {base.text.vocab_size} classes, {likely.sum(-1).float().mean():.0f} are likelier than {LIKELY:g}.")


@with_source
def main(
    source: Source,
    vocab_size: VocabSize = 2048,
    words: Words = False,
    hidden_size: int = 32,
    num_layers: int = 2,
    steps: Annotated[int, typer.Option(help="Steps of each fine-tuning.")] = 1000,
    checkpoint_steps: Annotated[int, typer.Option(help="Steps of the checkpoint, at most.")] = 40000,
    seeds: Seeds = 3,
    shortlists: Annotated[bool, typer.Option("--shortlists", help="The table of shortlists, not the others.")] = False,
    heads: Annotated[
        list[str] | None, typer.Option(help="With --shortlists: only these heads, beside the softmax and K = 4.")
    ] = None,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    tries, on_shortlist, long_heads, rounds = slice(None), CHOSEN + SHORTLISTS, LONG_SHORTLISTS, 4
    if quick:
        vocab_size, hidden_size, num_layers, steps, checkpoint_steps, seeds = 512, 16, 1, 60, 400, 1
        tries, on_shortlist, rounds = slice(1, 2), [*CHOSEN, SHORTLISTS[2]], 2
    on_shortlist = [*CONTROLS, contexts(16), *on_shortlist]
    if heads:
        if not shortlists:
            raise typer.BadParameter("--heads: expected --shortlists with it, given none")
        on_shortlist, long_heads = heads_named(heads), []
    text = load_text(source, vocab_size, words)
    recipe = checkpoint_recipe(checkpoint_steps)
    results = Results(out, "retrofit_shortlists" if shortlists else "retrofit", quick)
    base = Experiment(text, Size(hidden_size, num_layers), recipe, results).from_checkpoint()
    checkpoint = base.checkpoint_result()
    print(
        f"The checkpoint: {checkpoint['steps']} steps, {checkpoint['seconds']:.0f} s, perplexity "
        f"{perplexities([checkpoint])[0]:.2f} (validation) and {perplexities([checkpoint], 'test')[0]:.2f} (test)"
    )
    whole = base.with_recipe(steps=steps, to_convergence=False)
    if shortlists:
        compare_shortlists(whole, on_shortlist, long_heads, tries, rounds, seeds)
        return
    found = configurations(whole, [*CONTROLS, FULL], tries)
    seconds = whole.seconds({name: entry for name, entry in found.items() if "steps" not in name}, rounds)
    rows = compare(found, seconds, seeds)
    show(f"The whole model on {text.name}, perplexity", rows)

    alone = {name: (experiment.with_recipe(train_backbone=False), head) for name, (experiment, head) in found.items()}
    timed = {name: entry for name, entry in alone.items() if "steps" not in name}
    seconds_alone = whole.with_recipe(train_backbone=False).seconds(timed, rounds)
    rows_alone = compare(timed, seconds_alone, seeds)
    show(f"The head alone on {text.name}, with the same learning rates, perplexity", rows_alone)

    scratch = replace(base, checkpoint=None)
    wide = scratch.widened(SOFTMAX, whole.operations(FULL)).with_recipe(learning_rate=WIDE_RATE)
    references = {
        f"softmax, hidden size {wide.size.hidden_size}": wide.train(SOFTMAX, 0),
        FULL.name: scratch.with_recipe(head_learning_rate=SCRATCH_HEAD_RATE).train(FULL, 0),
    }
    rows_scratch = [
        {
            "head": name,
            "steps": result["steps"],
            "seconds": round(result["seconds"]),
            "validation": spread(perplexities([result]), 2),
            "test": spread(perplexities([result], "test"), 2),
        }
        for name, result in {f"softmax, hidden size {hidden_size}: the checkpoint": checkpoint, **references}.items()
    ]
    show(f"From scratch on {text.name}, until the validation loss no longer fell, perplexity", rows_scratch)
    plot_costs(
        results.path.with_suffix(".png"),
        f"Fine-tuned from the same checkpoint on {text.name}",
        rows,
        {f"{name}, from scratch": perplexities([result])[0] for name, result in references.items()},
    )


if __name__ == "__main__":
    typer.run(main)
