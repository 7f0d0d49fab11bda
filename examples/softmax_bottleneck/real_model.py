"""Does a mixture pay on a real model? Heads, and adapters beside heads, on a pretrained language model.

    python examples/softmax_bottleneck/real_model.py --model smol --quick
    python examples/softmax_bottleneck/real_model.py --model smol --train-file train.txt --validation-file valid.txt

The head alone: the backbone and the decoder are frozen, and each head trains on the same hidden states in the same
order (`hf_mos.training.hidden_states`). The base is the model as it is. One softmax with a latent of its own (K = 1)
is the control of the mixtures; one on a shortlist, and a mixture of contexts, are further controls.

Adapters (`--adapters`): what a user would do instead. LoRA on every matrix of the backbone, with the old head and with
mixtures, for equal steps, and with the old head once more, at its best rate, for the seconds of a mixture that takes a
tenth longer or more.

The products are in bf16, by autocast. Seed 0 trains with each learning rate, the other seeds with the best. Nats are
those of `hf-mos evaluate`: each token of the validation text once, with its context.
`python examples/quickstart/smollm2.py smol` makes a model for `--model`.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from corpus import BLOCK_SIZE, Corpus, KeptCorpus
from models import SOFTMAX, ContextsHead, Head, contexts, heads_named, mixture, rescored, with_head
from plots import plot_costs
from results import DEFAULT_OUT, Out, Quick, Results, Seeds, mean, perplexities, show, spread, start
from text import Source, with_source
from training import Recipe, fit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_mos import MoSForCausalLM
from hf_mos.training.hidden_states import freeze_backbone

RATES = (3e-4, 1e-3, 3e-3)
ADAPTER_RATES = (1e-3, 3e-3, 1e-2)
FULL_RANK = {"shift_rank": 10**6}  # by default, shifts of 16 components have a lower one
FULL = [*(mixture(K) for K in (2, 4, 8)), mixture(16, **FULL_RANK)]
SHORTLISTS = [mixture(K, shortlist_size=M, **(FULL_RANK if K == 16 else {})) for M in (16, 64, 256) for K in (4, 16)]
CONTROLS = [mixture(1), rescored(64), contexts(4)]
RANKS_OF_SHIFTS = [mixture(16, shortlist_size=64, shift_rank=r) for r in (32, 64, 128, 256)]
HEADS = [*CONTROLS, *SHORTLISTS, *FULL, *RANKS_OF_SHIFTS]
QUICK_HEADS = [mixture(1), mixture(16, shortlist_size=64), mixture(4)]
# A slower head too: adapters learn best at a rate that is too high for a head at its default scale.
ADAPTED = [
    SOFTMAX,
    mixture(4, shortlist_size=64),
    mixture(4, latent_scale=0.1, shortlist_size=64),
    mixture(16, latent_scale=0.1, shortlist_size=64, **FULL_RANK),
    mixture(4, latent_scale=0.1),
]
RANKS = [8, 16]  # of LoRA
BATCH_SIZE = 2  # blocks
TOKENS_PER_STEP = BATCH_SIZE * BLOCK_SIZE


@dataclass(frozen=True)
class Study:
    """The trainings of one table; each runs once, and its result is kept."""

    model: Path
    corpus: Corpus
    data: Any  # the corpus, or its hidden states
    results: Results
    recipe: Recipe
    lora_rank: int | None = None

    def settings(self, head: Head, rate: float, seed: int, steps: int) -> dict[str, Any]:
        recipe = self.recipe.settings | {"learning_rate": rate, "steps": steps}
        found = {
            "model": self.model.name,
            **self.corpus.settings,
            "head": head.settings,
            "recipe": recipe,
            "autocast": "bfloat16",
            "seed": seed,
        }
        return found | ({"lora_rank": self.lora_rank} if self.lora_rank else {})

    def train(self, head: Head, rate: float, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
        steps = steps or self.recipe.steps

        def work() -> dict[str, Any]:
            recipe = Recipe(**self.recipe.settings | {"learning_rate": rate, "steps": steps})
            return fit(self.make(head, seed), self.data, recipe, seed, f"{head.name}, {rate:g}, seed {seed}")

        return self.results.run(self.settings(head, rate, seed, steps), work)

    def make(self, head: Head, seed: int) -> Any:
        """The model whose parameters that train are the head's, and the adapter's if there is one."""
        model = with_head(AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32), head, seed)
        freeze_backbone(model, train_decoder=False)
        if self.lora_rank is None:
            return model
        from peft import LoraConfig, get_peft_model

        of_head = {id(weight) for weight in model.parameters() if weight.requires_grad}
        torch.manual_seed(seed)
        targets = r".*\.(q|k|v|o|gate|up|down)_proj"
        adapted = get_peft_model(
            model, LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules=targets)
        )
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("lora_" in name or id(parameter) in of_head)
        return adapted

    def row(
        self, name: str, head: Head, rates: tuple[float, ...], seeds: int, steps: int | None = None
    ) -> dict[str, Any]:
        rate = min(rates, key=lambda rate: self.train(head, rate, steps=steps)["valid_nats"])
        found = [self.train(head, rate, seed, steps) for seed in range(seeds)]
        return {
            "head": name,
            "rate": f"{rate:g}",
            "steps": round(mean(found, "steps")),
            "seconds": round(mean(found, "seconds"), 1),
            "seeds": seeds,
            "validation": spread(perplexities(found), 2),
        }


def head_table(study: Study, heads: list[Head], rates: tuple[float, ...], seeds: int, out: Path) -> None:
    base = study.results.run(
        {"base": study.model.name, **study.corpus.settings},
        lambda: {"valid_nats": study.data.nats(with_head(load(study.model), SOFTMAX, 0), "valid")},
    )
    rows = [study.row("softmax" if head.name == "mixture K=1" else head.name, head, rates, seeds) for head in heads]
    first = dict.fromkeys(rows[0], "") | {"head": "as it is", "validation": f"{math.exp(base['valid_nats']):.2f}"}
    show(f"{study.model.name}, the head alone, on {study.corpus.name}", [first, *rows])
    title = f"{study.model.name}: heads on the same hidden states"
    operations = {head.name: relative_operations(with_head(load(study.model), head, 0)) for head in heads}
    plot_costs(
        out / "real_model.png",
        title,
        [row | {"Top": row["steps"] * operations[head.name]} for row, head in zip(rows, heads, strict=True)],
    )


def relative_operations(model: MoSForCausalLM) -> float:
    """Operations of a step, in 10^12: two products with the decoder, whose gradient nobody wants."""
    head: Any = model.mos_head
    K, M, (V, D) = head.num_mixtures, head.shortlist_size, head.weight.shape
    rows = V if isinstance(head, ContextsHead) else K * V if M is None else V + K * M
    return 2 * 2 * TOKENS_PER_STEP * rows * D / 1e12


def load(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def adapter_table(study: Study, rates: tuple[float, ...], seeds: int) -> None:
    """Each head beside an adapter, and the old head for the seconds of a dear one, at the old head's best rate."""
    rows = []
    softmax = {}
    for head in ADAPTED:
        rows.append(study.row(f"LoRA {study.lora_rank}, {head.name}", head, rates, seeds))
        if head is SOFTMAX:
            softmax = rows[0]
        steps = round(softmax["steps"] * rows[-1]["seconds"] / softmax["seconds"])
        if steps <= 1.1 * softmax["steps"]:
            continue
        name, its_rate = f"LoRA {study.lora_rank}, softmax, its seconds", (float(softmax["rate"]),)
        rows.append(study.row(name, SOFTMAX, its_rate, seeds, steps))
    show(f"{study.model.name}, with an adapter, on {study.corpus.name}", rows)


@with_source
def main(
    model: Annotated[Path, typer.Option(help="Folder of a pretrained causal LM.")],
    source: Source,
    train_tokens: Annotated[int, typer.Option(help="Tokens to train on, at most.")] = 300_000,
    valid_tokens: Annotated[int, typer.Option(help="Tokens to validate on, at most.")] = 30_000,
    steps: Annotated[int, typer.Option(help="Steps of each training, of 512 tokens; at most, with --converge.")] = 200,
    converge: Annotated[bool, typer.Option("--converge", help="Train until the validation loss stays.")] = False,
    adapters: Annotated[bool, typer.Option("--adapters", help="The table of adapters, not that of heads.")] = False,
    lora_ranks: Annotated[list[int] | None, typer.Option(help=f"Ranks of the adapters, {RANKS} by default.")] = None,
    heads: Annotated[list[str] | None, typer.Option(help="Only these heads, such as 'mixture K=4 M=64'.")] = None,
    seeds: Seeds = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start(threads)
    chosen = heads_named(heads) if heads else QUICK_HEADS if quick else HEADS
    rates = ADAPTER_RATES if adapters else RATES
    if quick:
        rates, seeds, steps, train_tokens, valid_tokens = rates[:2], 1, 20, 12_000, 3_000
    tokenizer = AutoTokenizer.from_pretrained(model)
    corpus = Corpus.read(source, tokenizer, train_tokens, valid_tokens)
    print(f"{corpus.blocks.numel():,} tokens to train on, {corpus.num_targets:,} to validate", file=sys.stderr)
    results = Results(out, "real_model", quick)
    # The head or the adapter alone trains: whatever is not frozen.
    recipe = Recipe(
        steps,
        learning_rate=0,
        batch_size=BATCH_SIZE,
        weight_decay=0.0,
        warmup=0.1,
        train_backbone=None,
        to_convergence=converge,
        evaluate_every=max(1, steps // 20),
    )
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # the cache would not see a weight's update
        if adapters:
            for rank in lora_ranks or (RANKS[:1] if quick else RANKS):
                adapter_table(Study(model, corpus, corpus, results, recipe, rank), rates, seeds)
            return
        frozen = with_head(load(model), mixture(1), 0)
        freeze_backbone(frozen)
        kept = KeptCorpus.keep(corpus, frozen, out / "models" / f"hidden-states-{model.name}")
        head_table(Study(model, corpus, kept, results, recipe), chosen, rates, seeds, out)


if __name__ == "__main__":
    typer.run(main)
