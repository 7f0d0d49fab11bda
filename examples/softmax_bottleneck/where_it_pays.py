"""At which sizes does the mixture pay? Its gain at the same steps, against its cost, as the hidden size grows.

    python examples/softmax_bottleneck/where_it_pays.py --quick
    python examples/softmax_bottleneck/where_it_pays.py --data-dir ptb --words
    python examples/softmax_bottleneck/where_it_pays.py --data-dir ptb --to-convergence --hidden-sizes 16

For each hidden size D a softmax and a mixture of 4 are trained from scratch for the same steps, and the softmax for
twice as many; or all of them until the validation loss no longer falls, and the softmax also with twice the patience.
The gain is in nats per token. The mixture costs `cost` times the softmax, in operations and in seconds. A softmax that
is given more steps gains too: `doubling` is what twice the steps gain it. So the mixture is ahead at equal cost where
it costs less than

    break-even = 2 ** (gain / doubling)

times the softmax. The last table has the factor by which a mixture multiplies the operations of a training step in
models in use: of K = 4 on all classes, and of the default, K = 16 on 64 classes.
"""

import math
from typing import Annotated, Any

import torch
import typer
from experiment import Experiment
from models import SOFTMAX, Size, mixture
from plots import plot_gain
from results import DEFAULT_OUT, Out, Quick, Results, Seeds, mean, perplexities, show, spread, start
from text import Source, VocabSize, Words, load_text, with_source
from training import convergence_recipe, from_scratch_recipe, new_latents_rate
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from hf_mos.remote_code.configuration_mos import default_rank
from hf_mos.tools.head_options import head_cost

MIXTURE = mixture(4)
HIDDEN_SIZES = [64, 128, 256, 512]
TOKENS_PER_STEP = 2048  # in models in use
# As their configs have them; only the numbers of their parameters are used.
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32}
MODELS_IN_USE = {
    "GPT-2": GPT2Config(),
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "Llama-3.2-1B": LlamaConfig(**LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
    "Llama-3.1-8B": LlamaConfig(**LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
}


def measure(experiment: Experiment, seeds: int, rounds: int) -> dict[str, Any]:
    recipe = experiment.recipe
    longer = experiment.with_recipe(
        **({"patience": 2 * recipe.patience} if recipe.to_convergence else {"steps": 2 * recipe.steps})
    )
    softmaxes, longers, mixtures = [], [], []
    for seed in range(seeds):
        softmaxes.append(experiment.train(SOFTMAX, seed))
        mixtures.append(experiment.train(MIXTURE, seed))
        longers.append(longer.train(SOFTMAX, seed))
    seconds = experiment.seconds({"softmax": (experiment, SOFTMAX), "mixture": (experiment, MIXTURE)}, rounds)
    gain = mean(softmaxes, "valid_nats") - mean(mixtures, "valid_nats")
    doublings = math.log2(mean(longers, "steps") / mean(softmaxes, "steps"))
    doubling = (mean(softmaxes, "valid_nats") - mean(longers, "valid_nats")) / doublings if doublings else math.nan
    steps_ratio = mean(mixtures, "steps") / mean(softmaxes, "steps")
    return {
        "D": experiment.size.hidden_size,
        "V / D": experiment.text.vocab_size // experiment.size.hidden_size,
        "softmax": spread(perplexities(softmaxes)),
        "mixture K=4": spread(perplexities(mixtures)),
        "softmax, longer": spread(perplexities(longers)),
        "x steps": round(2**doublings, 2),
        "gain, nats": round(gain, 3),
        "doubling, nats": round(doubling, 3),
        "break-even cost": round(2 ** (gain / doubling), 2),
        "cost, operations": round(steps_ratio * experiment.operations(MIXTURE) / experiment.operations(SOFTMAX), 2),
        "cost, seconds": round(steps_ratio * seconds["mixture"] / seconds["softmax"], 2),
    }


def costs_in_use() -> list[dict[str, Any]]:
    """The factor by which a mixture multiplies the operations of training, without the matmuls of attention."""
    rows = []
    for name, config in MODELS_IN_USE.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        D, V = config.hidden_size, config.vocab_size
        embedding = model.get_input_embeddings().weight
        unread = {id(embedding), id(model.get_output_embeddings().weight)}
        layers = sum(weight.numel() for weight in model.parameters() if id(weight) not in unread)
        whole = layers + V * D

        def cost(K: int, M: int | None = None, D: int = D, V: int = V, whole: int = whole) -> float:
            more = head_cost(K, M, default_rank(K, D, V), D, V, TOKENS_PER_STEP) - 1
            return round(1 + more * V * D / whole, 2)

        rows.append(
            {
                "model": name,
                "head's share": round(V * D / whole, 2),  # of the softmax model's multiplications
                "K=4": cost(4),
                "K=16 M=64": cost(16, 64),
            }
        )
    return rows


@with_source
def main(
    source: Source,
    vocab_size: VocabSize = 2048,
    words: Words = False,
    hidden_sizes: Annotated[list[int] | None, typer.Option(help="D; give it several times.")] = None,
    num_layers: int = 2,
    to_convergence: Annotated[
        bool, typer.Option("--to-convergence", help="Until the validation loss no longer falls.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="300; to convergence 40000 at most.")] = None,
    learning_rate: Annotated[
        float, typer.Option(help="At D = 32; in proportion to 1 / sqrt(D) elsewhere, and a tenth for the latents.")
    ] = 5e-3,
    seeds: Seeds = 1,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    sizes = hidden_sizes or HIDDEN_SIZES
    if quick:
        vocab_size, sizes, num_layers, steps = 512, [8, 16, 32], 1, 400 if to_convergence else 60
    text = load_text(source, vocab_size, words)
    question = "where_it_pays_to_convergence" if to_convergence else "where_it_pays"
    results, rows = Results(out, question, quick), []
    for hidden_size in sizes:
        rate = learning_rate * math.sqrt(32 / hidden_size)
        make_recipe, default_steps = (convergence_recipe, 40000) if to_convergence else (from_scratch_recipe, 300)
        recipe = make_recipe(steps or default_steps, rate, new_latents_rate(rate))
        experiment = Experiment(text, Size(hidden_size, num_layers), recipe, results)
        rows.append(measure(experiment, seeds, rounds=2 if quick else 5))
    until = "to convergence" if to_convergence else f"{steps or 300} steps"
    show(f"From scratch on {text.name}, {until}, perplexity, {seeds} seeds", rows)
    show("Operations of a training step with a mixture, as a multiple of those with one softmax", costs_in_use())
    plot_gain(results.path.with_suffix(".png"), rows)


if __name__ == "__main__":
    typer.run(main)
