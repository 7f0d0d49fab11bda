"""Which rank does the log-probability matrix of a trained model have? One softmax, mixed contexts, mixed softmaxes.

    python examples/softmax_bottleneck/rank.py --quick
    python examples/softmax_bottleneck/rank.py --data-dir ptb

Each head is trained on the same backbone for the same steps. Then the matrix of its log-probabilities over many
contexts of the validation text is made and taken apart in float64. One softmax, and one softmax of mixed contexts, are
bounded by the hidden size + 1; a mixture of softmaxes is bounded by the matrix alone. The paper counted 400, 280 and
9981 for these three, of 10,000 words. A low tolerance counts directions that hardly matter, so the rank under greater
ones is printed too, and the plot has all the singular values.
"""

from typing import Annotated, Any

import typer
from experiment import Experiment
from models import SOFTMAX, Head, Size, contexts, mixture
from plots import plot_spectra
from results import DEFAULT_OUT, Out, Quick, Results, show, start
from text import Source, VocabSize, Words, load_text, with_source
from training import fit, from_scratch_recipe

from hf_mos.tools.rank import log_prob_matrix, log_prob_rank

HEADS = [SOFTMAX, contexts(4), *(mixture(K) for K in (2, 4, 8, 15))]
QUICK = [SOFTMAX, contexts(4), mixture(2), mixture(4), mixture(15)]
TOLERANCES = (1e-6, 1e-4, 1e-2)
PLOTTED = 400  # singular values of each matrix that are kept


def measure(experiment: Experiment, head: Head, seed: int, num_contexts: int) -> dict[str, Any]:
    model = experiment.model(head, seed)
    fitted = fit(model, experiment.text, experiment.recipe, seed, head.name)
    log_probs = log_prob_matrix(model, experiment.text.valid, num_contexts)
    found = log_prob_rank(log_probs)
    relative = found.singular_values / found.singular_values[0]
    step = max(1, len(relative) // PLOTTED)
    return {
        "contexts": len(log_probs),
        "rank": found.rank,
        "tolerance": found.tolerance,
        **{f"rank at {tolerance:g}": found.at(tolerance) for tolerance in TOLERANCES},
        "singular_values": [[i + 1, float(f"{relative[i]:.3g}")] for i in range(0, len(relative), step)],
        "valid_nats": fitted["valid_nats"],
    }


@with_source
def main(
    source: Source,
    vocab_size: VocabSize = 2048,
    words: Words = False,
    hidden_size: int = 32,
    num_layers: int = 2,
    steps: Annotated[int, typer.Option(help="Training steps before the rank is measured.")] = 500,
    num_contexts: Annotated[int, typer.Option(help="N, the rows of the matrix.")] = 4096,
    seed: int = 0,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    if quick:
        vocab_size, hidden_size, num_layers, steps, num_contexts = 512, 16, 1, 200, 1024
    text = load_text(source, vocab_size, words)
    recipe = from_scratch_recipe(steps, learning_rate=5e-3, head_learning_rate=5e-4)
    experiment = Experiment(text, Size(hidden_size, num_layers), recipe, Results(out, "rank", quick))
    measured = {}
    for head in QUICK if quick else HEADS:
        settings = {**experiment.settings(head, seed), "num_contexts": num_contexts}
        measured[head.name] = experiment.results.run(
            settings, lambda head=head: measure(experiment, head, seed, num_contexts)
        )
    any_of_them = next(iter(measured.values()))
    title = (
        f"Rank of {any_of_them['contexts']} x {text.vocab_size} log-probabilities on {text.name}, hidden size "
        f"{hidden_size}: singular values above {any_of_them['tolerance']:.1e} of the largest, and above greater shares"
    )
    rows = [
        {"head": name, "rank": found["rank"], **{f"above {t:g}": found[f"rank at {t:g}"] for t in TOLERANCES}}
        for name, found in measured.items()
    ]
    show(title, rows)
    spectra = {name: found["singular_values"] for name, found in measured.items()}
    plot_spectra(experiment.results.path.with_suffix(".png"), hidden_size + 1, spectra)


if __name__ == "__main__":
    typer.run(main)
