"""How the head should start on a trained model: exact at step 0, and yet its components part. Measured.

    python examples/benchmarks/initialisation.py

A small Llama is trained with one softmax on Python's documentation, then fine-tuned for the same steps from each
initialisation. The columns: the largest change of a log-probability at step 0, the validation perplexity after the
steps, and the distance between the components: the standard deviation of the latents over the components, in units of
the hidden states' own. Needs: pip install '.[examples]'.
"""

import copy
import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import report
from rich.console import Console
from rich.progress import track
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_mos import MoSForCausalLM, MoSLMHead


def no_change(head: MoSLMHead) -> None:
    pass


def equal_weights(head: MoSLMHead) -> None:
    nn.init.zeros_(head.prior.weight)


def noise_in_latents(head: MoSLMHead) -> None:
    nn.init.zeros_(head.prior.weight)
    head.shift.weight.data += 0.02 / head.latent_scale * torch.randn_like(head.shift.weight)


def wide_prior(head: MoSLMHead) -> None:
    head.prior.weight.data *= 3


STARTS = {
    "one softmax": None,
    "shift next to zero, random prior (the default)": no_change,
    "shift next to zero, three times the prior's spread": wide_prior,
    "shift next to zero, equal weights": equal_weights,
    "shift of noise 0.02, equal weights": noise_in_latents,
}


def blocks_of_text(vocab_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
    from python_documentation import python_documentation

    texts = python_documentation()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    parts = []
    for remainder in (0, 1):  # every tenth document is for validation
        chosen = [text for i, text in enumerate(texts) if (i % 10 == 0) == bool(remainder)]
        ids = torch.tensor([token for encoding in tokenizer.encode_batch(chosen) for token in encoding.ids])
        parts.append(ids[: len(ids) // block_size * block_size].view(-1, block_size))
    return parts[0], parts[1]


def train(model: PreTrainedModel, blocks: Tensor, steps: int, learning_rate: float, name: str) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in track(range(steps), description=name, console=Console(stderr=True), transient=True):
        batch = blocks[torch.randint(len(blocks), (16,))]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch.clone()).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: Tensor) -> float:
    losses = [model(input_ids=batch, labels=batch.clone()).loss * len(batch) for batch in blocks.split(16)]
    return math.exp(sum(losses).item() / len(blocks))


@torch.no_grad()
def parting(model: MoSForCausalLM, blocks: Tensor) -> float:
    hidden_states = model.head_inputs(input_ids=blocks[:8])
    latents = model.mos_head.latents(hidden_states)
    return (latents.std(dim=-2).mean() / hidden_states.std()).item()


def main(
    num_mixtures: int = 4,
    hidden_size: int = 32,
    vocab_size: int = 2048,
    steps: int = 400,
    learning_rate: float = 1e-2,
    threads: int = 2,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    training, validation = blocks_of_text(vocab_size, 64)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    checkpoint = LlamaForCausalLM(config)
    train(checkpoint, training, steps, learning_rate, "the checkpoint")
    with torch.no_grad():
        before = checkpoint(validation[:8]).logits.log_softmax(-1)

    rows = []
    for name, start in STARTS.items():
        torch.manual_seed(0)
        model = copy.deepcopy(checkpoint)
        if start is not None:
            model = MoSForCausalLM.from_causal_lm(model, num_mixtures=num_mixtures, shortlist_size=None)
            start(model.mos_head)
        with torch.no_grad():
            gap = (model(validation[:8]).logits.log_softmax(-1) - before).abs().max().item()
        train(model, training, steps, learning_rate, name)
        parted = parting(model, validation) if start is not None else 0.0
        rows.append(
            {"start": name, "change at step 0": gap, "perplexity": perplexity(model, validation), "parted": parted}
        )
    settings = {"num_mixtures": num_mixtures, "hidden_size": hidden_size, "vocab_size": vocab_size, "steps": steps}
    report("Initialisation: " + ", ".join(f"{k} {v}" for k, v in settings.items()), rows, settings, json_)


if __name__ == "__main__":
    typer.run(main)
