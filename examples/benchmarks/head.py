"""The default head against one softmax, from the hidden states on, at the sizes of models that people use.

    python examples/benchmarks/head.py
    python examples/benchmarks/head.py --num-tokens 2048 --rounds 3
    python examples/benchmarks/head.py --size 4096x32000 --rounds 3 --head "the default"

Each time is the median of calls that take turns, forward and backward in fp32, in processor seconds of one thread, so
that other work on the machine changes them less. One softmax is `cross_entropy(h @ W.T)` in plain torch, and
`log_softmax(h @ W.T)` where a token of 1 or 32 sequences is decoded. Before each decoding call run two layers of a
Llama of this width, untimed: a head finds their weights and code in the caches, not its own. `counted` is what
`hf_mos.tools.head_options.head_cost` says of the multiplications of training. Needs: pip install '.[examples]'.
"""

import functools
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from measure import report, time_in_turn
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from hf_mos import MoSLMHead, mos_cross_entropy
from hf_mos.tools.head_options import head_cost, num_new_weights

SIZES = ["576x49152", "1024x32064", "1024x8192"]  # SmolLM2; V / D of Llama-3-8B; V / D of Llama-2-7B
HEADS: dict[str, dict[str, Any]] = {
    "the default": {},
    "shift_rank=64": {"shift_rank": 64},
    "shift of full rank": {"shift_rank": 10**6},
    "K=4 on all classes": {"num_mixtures": 4, "shortlist_size": None, "shift_rank": 10**6},
}


def make_head(width: int, num_classes: int, **options: Any) -> MoSLMHead:
    """A head away from its start, where its components differ."""
    torch.manual_seed(0)
    head = MoSLMHead(width, num_classes, **options)
    nn.init.normal_(head.weight, std=width**-0.5)
    nn.init.normal_(head.shift.weight, std=0.1 / head.latent_scale * width**-0.5)
    return head


def step_of(head: MoSLMHead, hidden_states: Tensor, targets: Tensor, trains_decoder: bool) -> Callable[[], Any]:
    def step() -> Any:
        head.weight.requires_grad_(trains_decoder)
        wanted = [hidden_states, *(weight for weight in head.parameters() if weight.requires_grad)]
        return torch.autograd.grad(head(hidden_states, targets), wanted)

    return step


def softmax_step(
    weight: Tensor, hidden_states: Tensor, targets: Tensor, trains_decoder: bool, ours: bool
) -> Callable[[], Any]:
    weight = weight.detach().clone().requires_grad_(trains_decoder)
    wanted = [hidden_states, *([weight] if trains_decoder else [])]

    def step() -> Any:
        if ours:
            gate = hidden_states.new_zeros(len(targets), 1)
            return torch.autograd.grad(mos_cross_entropy(hidden_states.unsqueeze(1), gate, weight, targets), wanted)
        return torch.autograd.grad(F.cross_entropy(hidden_states @ weight.T, targets), wanted)

    return step


@torch.no_grad()
def decoding(heads: dict[str, MoSLMHead], weight: Tensor, batch: int, rounds: int) -> dict[str, float]:
    hidden_states = torch.randn(batch, 1, weight.shape[1])
    sizes = {"hidden_size": weight.shape[1], "intermediate_size": 2 * weight.shape[1], "num_hidden_layers": 2}
    llama = LlamaModel(LlamaConfig(**sizes, num_attention_heads=8, vocab_size=8)).eval()
    calls: dict[str, Callable[[], Any]] = {"softmax": lambda: F.log_softmax(hidden_states @ weight.T, dim=-1)}
    for name, head in heads.items():
        calls[name] = lambda head=head: head(hidden_states, add_log_partition=True)
    before = functools.partial(llama, inputs_embeds=hidden_states, use_cache=False)
    seconds = time_in_turn(calls, 5 * rounds, clock=time.process_time, before=before)
    return {name: value / seconds["softmax"] for name, value in seconds.items()}


def rows_of(width: int, num_classes: int, names: list[str], num_tokens: int, rounds: int) -> list[dict[str, Any]]:
    hidden_states = torch.randn(num_tokens, width).requires_grad_()
    targets = torch.randint(0, num_classes, (num_tokens,))
    heads = {name: make_head(width, num_classes, **HEADS[name]) for name in names}
    weight = heads[names[0]].weight
    seconds = {}
    for trains_decoder in (True, False):
        softmax = (weight, hidden_states, targets, trains_decoder)
        calls = {
            "softmax": softmax_step(*softmax, ours=False),
            "softmax, our loss": softmax_step(*softmax, True),
        }
        calls |= {name: step_of(head, hidden_states, targets, trains_decoder) for name, head in heads.items()}
        seconds[trains_decoder] = time_in_turn(calls, rounds, clock=time.process_time)
    decoded = {batch: decoding(heads, weight, batch, rounds) for batch in (1, 32)}
    rows = []
    for name in seconds[True]:
        row: dict[str, Any] = {"D x V": f"{width} x {num_classes}", "head": name}
        row["training"], row["frozen decoder"] = (each[name] / each["softmax"] for each in seconds.values())
        row |= {f"decoding {batch}": found.get(name, "") for batch, found in decoded.items()}
        row |= dict.fromkeys(("counted", "rank", "new weights"), "")
        if (head := heads.get(name)) is not None:
            size = (head.num_mixtures, head.shortlist_size, head.shift_rank, width, num_classes)
            row |= {"counted": head_cost(*size, num_tokens), "rank": head.shift_rank}
            row["new weights"] = f"{num_new_weights(head):,}"
        rows.append(row)
    return rows


def main(
    size: Annotated[list[str] | None, typer.Option(help="DxV; may be repeated.")] = None,
    head: Annotated[list[str] | None, typer.Option(help="One of: " + "; ".join(HEADS) + ". May be repeated.")] = None,
    num_tokens: int = 512,
    rounds: int = 5,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    torch.set_num_threads(1)
    if unknown := set(head or []) - set(HEADS):
        raise typer.BadParameter(f"expected some of {list(HEADS)}, given {sorted(unknown)}", param_hint="--head")
    rows = []
    for each in size or SIZES:
        width, num_classes = map(int, each.split("x"))
        rows += rows_of(width, num_classes, head or list(HEADS), num_tokens, rounds)
    settings = {"num_tokens": num_tokens, "rounds": rounds}
    report("Heads, of one softmax head: forward and backward", rows, settings, json_)


if __name__ == "__main__":
    typer.run(main)
