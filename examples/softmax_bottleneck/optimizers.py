"""Does the mixture gain under every optimizer with the learning rate of the softmax, and nothing else set?

    python examples/softmax_bottleneck/optimizers.py --quick
    python examples/softmax_bottleneck/optimizers.py --data-dir ptb

From the same trained softmax model, the softmax and the mixture of 4 are fine-tuned by each optimizer with its usual
learning rate, the same for both heads and for all weights. Adafactor is that of transformers, with a fixed rate. Muon
updates the matrices; AdamW updates the embedding, which is the decoder too, and all vectors. The row of 8 bits needs
torchao. A seed is that of the mixture's prior, by which the results differ most; the softmax has no random weight.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from experiment import Experiment
from models import SOFTMAX, Size, mixture
from results import DEFAULT_OUT, Out, Quick, Results, Seeds, perplexities, show, spread, start
from text import Source, Text, VocabSize, load_text, with_source
from torch import nn
from training import checkpoint_recipe
from transformers import Adafactor, PreTrainedModel

RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    optimizers: Callable[[PreTrainedModel], list[torch.optim.Optimizer]]
    max_norm: float | None = 1.0
    accumulation: int = 1
    dtype: torch.dtype = torch.float32


def of(make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], **options: Any) -> Setting:
    return Setting(lambda model: [make(model.parameters())], **options)


def adamw(weight_decay: float = 0.0, **options: Any) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    return lambda weights: torch.optim.AdamW(weights, lr=RATE, weight_decay=weight_decay, **options)


def muon_and_adamw(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    embedding = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.dim() == 2 and weight is not embedding]
    others = [weight for weight in model.parameters() if weight.dim() != 2 or weight is embedding]
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw()(others)]


def adamw_of_8_bits(weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(weights, lr=torch.tensor(RATE), weight_decay=0.0)


SETTINGS = {
    "AdamW": of(adamw()),
    "AdamW, no clipping": of(adamw(), max_norm=None),
    "AdamW, gradients of norm 0.1 at most": of(adamw(), max_norm=0.1),
    "AdamW, weight decay 0.1": of(adamw(weight_decay=0.1)),
    "AdamW, fused": of(adamw(fused=True)),
    "AdamW, 4 steps accumulated": of(adamw(), accumulation=4),
    "AdamW, bf16 weights": of(adamw(), dtype=torch.bfloat16),
    "Adafactor": of(lambda weights: Adafactor(weights, lr=RATE, relative_step=False, scale_parameter=False)),
    "Muon": Setting(muon_and_adamw),
    "SGD with momentum": of(lambda weights: torch.optim.SGD(weights, lr=30 * RATE, momentum=0.9)),
}
if find_spec("torchao"):
    SETTINGS["AdamW, states of 8 bits"] = of(adamw_of_8_bits)
QUICK = ["AdamW", "SGD with momentum"]


def train(
    make: Callable[[], PreTrainedModel], text: Text, setting: Setting, steps: int, batch_size: int
) -> dict[str, Any]:
    """Trains a model with a rate that falls to zero; returns the `valid_nats`."""
    model = make().to(setting.dtype)
    model.lm_head.prior.float() if hasattr(model.lm_head, "prior") else None
    optimizers = setting.optimizers(model)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    batches = text.batches(batch_size // setting.accumulation, seed=0)
    model.train()
    for step in range(steps):
        for _ in range(setting.accumulation):
            (model(**next(batches)).loss / setting.accumulation).backward()
        if setting.max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), setting.max_norm)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
    return {"valid_nats": text.nats(model, "valid")}


@with_source
def main(
    source: Source,
    vocab_size: VocabSize = 2048,
    hidden_size: int = 32,
    checkpoint_steps: Annotated[int, typer.Option(help="Steps of the softmax model, at most.")] = 40000,
    steps: Annotated[int, typer.Option(help="Steps of each fine-tuning.")] = 500,
    seeds: Seeds = 3,
    out: Out = DEFAULT_OUT,
    quick: Quick = False,
) -> None:
    start()
    if quick:
        vocab_size, hidden_size, checkpoint_steps, steps, seeds = 512, 16, 400, 30, 1
    text, results = load_text(source, vocab_size), Results(out, "optimizers", quick)
    base = Experiment(text, Size(hidden_size, 2), checkpoint_recipe(checkpoint_steps), results).from_checkpoint()
    batch_size = base.recipe.batch_size
    rows = []
    for name in QUICK if quick else SETTINGS:
        row = {"optimizer": name}
        for column, head, count in (("softmax", SOFTMAX, 1), ("mixture", mixture(4), seeds)):
            runs = []
            for seed in range(count):
                model, setting = partial(base.model, head, seed), SETTINGS[name]
                settings = {**text.settings, "head": head.settings, "optimizer": name, "steps": steps, "seed": seed}
                runs.append(results.run(settings, partial(train, model, text, setting, steps, batch_size)))
            row[column] = spread(perplexities(runs), 2)
        rows.append(row)
    show(f"D = {hidden_size}, fine-tuned on {text.name}, {steps} steps, validation perplexity", rows)


if __name__ == "__main__":
    typer.run(main)
