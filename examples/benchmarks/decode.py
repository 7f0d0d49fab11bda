"""Decoding: the cost of one token in the head of the mixture and of one softmax, and in `generate`.

The floor of a mixture of K is the product of K rows by the fastest of torch's matmul, the same by columns, and oneDNN,
and the mixing of its K log-softmaxes.

    python examples/benchmarks/decode.py
    python examples/benchmarks/decode.py --hidden-size 768 --vocab-size 50257 --json

Times are medians of calls in turn. Needs: pip install '.[examples]'.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from loss import onednn
from measure import report, time_in_turn
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_mos import MoSForCausalLM, MoSLMHead
from hf_mos.remote_code.mos_decoder import logsumexp_

HEADS: tuple[dict[str, Any], ...] = (
    {"num_mixtures": 4, "shortlist_size": None},
    {"num_mixtures": 16, "shortlist_size": None},
    {"num_mixtures": 16, "shortlist_size": 64},
)
BATCHES = (1, 8, 32)  # sequences that are decoded together
PRODUCTS = {
    "rows": F.linear,
    "columns": lambda rows, weight: (weight @ rows.T).T.contiguous(),
    "oneDNN": lambda rows, weight: onednn(rows, weight.T),
}


def backbone_config(hidden_size: int, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def away_from_its_start(head: MoSLMHead) -> MoSLMHead:
    """Makes the components differ, as equal ones are no fair work for `generate`."""
    with torch.no_grad():
        for weight in (head.prior.weight, head.shift.weight):
            weight.add_(0.02 / head.latent_scale * torch.randn_like(weight))
    return head


def floor_calls(decoder: nn.Linear, num_mixtures: int, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The product of a batch by each library, and the mixing: the floor is the fastest product and the mixing."""
    rows = torch.randn(batch * num_mixtures, decoder.in_features)
    log_weights = torch.randn(batch, num_mixtures).log_softmax(-1)
    logits = torch.randn(batch, num_mixtures, decoder.out_features)
    products = PRODUCTS if torch.backends.mkldnn.is_available() else {"rows": F.linear}
    calls: dict[str, Any] = {name: partial(product, rows, decoder.weight) for name, product in products.items()}
    log_softmax = partial(torch.log_softmax, logits, dim=-1, out=logits)
    return calls | {"mixing": lambda: logsumexp_(log_softmax().add_(log_weights.unsqueeze(-1)))}


def name_of(options: dict[str, Any]) -> str:
    size = options["shortlist_size"]
    return f"mixture of {options['num_mixtures']}" + (f" on {size} classes" if size else "")


def main(
    hidden_size: int = 768,
    vocab_size: int = 50257,
    new_tokens: int = 32,
    prompt_tokens: int = 128,
    rounds: int = 15,
    threads: int = 2,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    config = backbone_config(hidden_size, vocab_size)
    softmax = LlamaForCausalLM(config).eval()
    decoder: nn.Linear = softmax.lm_head
    settings = {"hidden_size": hidden_size, "vocab_size": vocab_size, "prompt_tokens": prompt_tokens}

    base = "log_softmax(h @ W.T)"
    states = {batch: torch.randn(batch, hidden_size) for batch in BATCHES}
    calls = {
        (base, batch): lambda states=states[batch]: F.log_softmax(states @ decoder.weight.T, dim=-1)
        for batch in BATCHES
    }
    models = {"softmax": softmax}
    for options in HEADS:
        model = MoSForCausalLM.from_causal_lm(softmax, **options).eval()
        head = away_from_its_start(model.mos_head)
        models[name_of(options)] = model
        for batch in BATCHES:
            calls[name_of(options), batch] = lambda head=head, states=states[batch]: head(states)
            check(head, states[batch])
    K = HEADS[0]["num_mixtures"]
    floors = {
        ("floor", batch, name): call for batch in BATCHES for name, call in floor_calls(decoder, K, batch).items()
    }
    with torch.inference_mode():
        seconds = time_in_turn(calls | floors, 3 * rounds)
    parts = {key: seconds.pop(key) for key in floors}
    for batch in BATCHES:
        products = [parts[key] for key in parts if key[1] == batch and key[2] != "mixing"]
        seconds[f"the floor of {name_of(HEADS[0])}", batch] = min(products) + parts["floor", batch, "mixing"]
    rows = [
        {"head, one token": name}
        | {f"ms, batch of {batch}": 1e3 * seconds[name, batch] for batch in BATCHES}
        | {f"of a softmax, {batch}": seconds[name, batch] / seconds[base, batch] for batch in BATCHES}
        for name in dict.fromkeys(name for name, _ in seconds)
    ]

    prompt = torch.randint(1, vocab_size, (1, prompt_tokens))
    with torch.inference_mode():
        prefill = time_in_turn({n: lambda m=m: m(prompt, logits_to_keep=1) for n, m in models.items()}, rounds)
        ends = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        runs = {n: lambda m=m: m.generate(prompt, **ends) for n, m in models.items()}
        generation = time_in_turn(runs, max(3, rounds // 3))
    whole = [
        {
            "2-layer model": name,
            "prefill ms": 1e3 * prefill[name],
            "of the softmax model's": prefill[name] / prefill["softmax"],
            "tokens per second": new_tokens / generation[name],
            "of the softmax model": generation["softmax"] / generation[name],
        }
        for name in models
    ]
    report("Decoding: the head alone", rows, settings, json_)
    report("Decoding: prefill with logits_to_keep=1, and generate", whole, settings, json_)


def check(head: MoSLMHead, hidden_states: torch.Tensor) -> None:
    """Stops if a head is wrong, so that no time of it is printed."""
    with torch.inference_mode():
        fast = head(hidden_states)
    error = (fast - head(hidden_states).detach()).abs().max().item()
    if not error < 1e-3:
        raise SystemExit(f"inference differs from the reference by {error:.1e}")


if __name__ == "__main__":
    typer.run(main)
