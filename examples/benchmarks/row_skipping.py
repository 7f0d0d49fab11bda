"""Would it pay to skip rows of small responsibility in the backward pass? Measured on a trained head.

    python examples/benchmarks/row_skipping.py model --text-file some.txt

A row (token, component) whose responsibility the working dtype cannot see adds nothing to the gradients, and
its two backward products could be skipped. This prints, for thresholds up to that of each dtype, the share of such
rows and the error that leaving them out would make in the decoder's gradient, beside plain autograd's own in fp32.
Needs: pip install '.[examples]'.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from measure import report
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_mos import MoSForCausalLM, mos_log_probs

THRESHOLDS = {
    "fp32": torch.finfo(torch.float32).eps,
    "1e-4": 1e-4,
    "fp16": torch.finfo(torch.float16).eps,
    "bf16": torch.finfo(torch.bfloat16).eps,
    "0.05": 0.05,
}


def main(
    model: str,
    text_file: Annotated[Path, typer.Option(help="A text like the training text of the model.")],
    num_tokens: int = 2048,
    block_size: int = 64,
    threads: int = 2,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    loaded: MoSForCausalLM = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = AutoTokenizer.from_pretrained(model)(text_file.read_text(), return_tensors="pt").input_ids[0]
    blocks = ids[: min(len(ids), num_tokens) // block_size * block_size].view(-1, block_size)
    if not len(blocks):
        raise SystemExit(f"text_file: expected at least {block_size} tokens, given {len(ids)}")
    head = loaded.mos_head
    if head.shortlist_size is not None:
        raise SystemExit(f"model: expected a full mixture, given a shortlist of {head.shortlist_size} classes")
    with torch.no_grad():
        hidden_states = loaded.head_inputs(input_ids=blocks)[:, :-1].flatten(0, 1)
        latents, prior_logits = head.latents(hidden_states), head.prior_logits(hidden_states)
    targets, weight = blocks[:, 1:].flatten(), head.weight.detach()

    exact, responsibilities = decoder_gradient(latents.double(), prior_logits.double(), weight.double(), targets, 0.0)
    leaf = weight.clone().requires_grad_()
    F.nll_loss(mos_log_probs(latents, prior_logits, leaf), targets).backward()
    rows = [row("plain autograd in fp32", 0.0, leaf.grad, exact)]
    for name, threshold in THRESHOLDS.items():
        skipped, _ = decoder_gradient(latents.double(), prior_logits.double(), weight.double(), targets, threshold)
        share = (responsibilities < threshold).double().mean().item()
        rows.append(row(f"skip r < {threshold:.1e} ({name})", share, skipped, exact))
    settings = {"model": model, "num_mixtures": head.num_mixtures, "tokens": len(targets)}
    report("Rows that could be skipped: " + ", ".join(f"{k} {v}" for k, v in settings.items()), rows, settings, json_)


def row(name: str, share: float, gradient: torch.Tensor, exact: torch.Tensor) -> dict[str, object]:
    error = ((gradient.double() - exact).norm() / exact.norm()).item()
    return {"": name, "share of rows": share, "error of the decoder's gradient": error}


def decoder_gradient(latents, prior_logits, weight, targets, threshold):
    """The decoder's gradient of the mean loss without the rows below the threshold, and the responsibilities."""
    log_probs = F.log_softmax(latents @ weight.T, dim=-1)  # (N, K, V)
    onehot = F.one_hot(targets, weight.shape[0]).unsqueeze(1)
    component_nll = -(log_probs * onehot).sum(-1)
    responsibilities = F.softmax(F.log_softmax(prior_logits, dim=-1) - component_nll, dim=-1)
    kept = responsibilities * (responsibilities >= threshold)
    error = (log_probs.exp() - onehot) * kept.unsqueeze(-1) / len(targets)
    return torch.einsum("nkv,nke->ve", error, latents), responsibilities


if __name__ == "__main__":
    typer.run(main)
