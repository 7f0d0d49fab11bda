"""Compares the hidden states that the softmax model of a trained mixture could read: see `MoSForCausalLM.to_softmax`.

    make quickstart TINY=1
    python tests/export_latents.py quickstart-out        # two minutes of one core

Its tiny Llama is trained with a softmax on pydoc's topics, and then for as many steps with mixtures, whose head is
trained alone or with the layers. The softmax model of each reads h, or what a decoder can take up: the mean of the
latents, or the mean that is weighted by the usage of the components.
"""

import copy
import sys
from collections.abc import Iterable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_mos import MoSForCausalLM
from hf_mos.tools.evaluate import evaluate

BLOCK, BATCH, STEPS, RATE = 64, 16, 400, 3e-3
HEADS: list[dict[str, Any]] = [{}, {"num_mixtures": 4, "shortlist_size": None}]


def train(model: Any, weights: Iterable[nn.Parameter], blocks: Tensor) -> None:
    optimizer, generator = torch.optim.AdamW(weights, lr=RATE), torch.Generator().manual_seed(0)
    model.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        batch = blocks[torch.randint(len(blocks), (BATCH,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        model.zero_grad()
    model.eval()


@torch.no_grad()
def with_one_shift(mixture: Any, weights: Tensor) -> Any:
    """The softmax model that reads h and the weighted mean of the shifts, as a mixture of one."""
    head = mixture.mos_head
    options = {"num_mixtures": 1, "shift_rank": head.shift_rank, "latent_scale": head.latent_scale}
    model = MoSForCausalLM.from_causal_lm(copy.deepcopy(mixture.to_softmax()), **options)
    shifts = head.shift.weight.unflatten(0, (head.num_mixtures, -1))
    model.mos_head.shift.weight.copy_((weights[:, None, None] * shifts).sum(0))
    if head.widening is not None:
        model.mos_head.widening.weight.copy_(head.widening.weight)
    return model.eval()


def main() -> None:
    logging.set_verbosity_error()
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*topics.values()]
    tokens = torch.tensor([token for text in texts[:-8] for token in tokenizer(text).input_ids])
    blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)

    def nats(model: Any) -> str:
        options = {"window": BLOCK, "stride": BLOCK, "batch_size": BATCH}
        return f"{evaluate(model, tokenizer, texts[-8:], **options).nats_per_token:.3f}"

    softmax = MoSForCausalLM.from_pretrained(folder).to_softmax()
    train(softmax, softmax.parameters(), blocks)
    print(f"nats per token: the softmax {nats(softmax)}")
    for layers in ("head alone", "all"):
        for options in HEADS:
            mixture = MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), **options)
            train(mixture, (mixture.mos_head if layers == "head alone" else mixture).parameters(), blocks)
            head = mixture.mos_head
            with torch.no_grad():
                usage = head.prior_logits(mixture.head_inputs(input_ids=blocks[:64])).softmax(-1).mean((0, 1))
            ways = {
                "h": mixture.to_softmax(),
                "mean": with_one_shift(mixture, torch.full_like(usage, 1 / len(usage))),
                "mean by usage": with_one_shift(mixture, usage),
            }
            found = ", ".join(f"{way} {nats(model)}" for way, model in ways.items())
            print(f"trained {layers}, {options or 'default'}: mixture {nats(mixture)}; softmax that reads {found}")


if __name__ == "__main__":
    main()
