"""The scores of each token that preference and reward trainers need, without a tensor of (N, K, V) or (N, V).

    p                 softmax(mixture's log-probabilities / temperature)                    (N, V)
    log_probs         log p(target)                                                         (N,)
    entropy           -sum_V p log p, in nats                                               (N,)
    log_sum_sq_probs  log sum_V p^2                                                         (N,)
    mean_logits       mean_V of the mixture's log-probabilities / temperature               (N,)
    is_top1           whether the target is the most likely class                           (N,)

The names are those of TRL, whose trainers read them. `log_probs` and `entropy` are differentiable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from .mos_chunks import AUTOGRAD_BYTES_PER_LOGIT, tokens_per_chunk
from .mos_latents import Latents
from .mos_log_probs import infer_log_probs, mos_log_probs
from .mos_loss import (
    ForEachInput,
    Gradients,
    LossInputs,
    LossOptions,
    differentiable_once,
    in_dtype_of,
    loss_and_gradients,
    wanted_of,
    work_dtype_of,
)
from .mos_vocabulary import widen

Scores = tuple[Tensor | None, ...]  # (N,) each, in the order of SCORES; None where not wanted
SCORES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ScoreOptions(NamedTuple):
    temperature: float = 1.0  # acts on the mixture
    wanted: tuple[str, ...] = SCORES[:1]  # `log_probs` are always computed


@dataclass
class TokenScores(ModelOutput):
    """Scores of each token, `None` where not wanted, and the loss, the mask and the router loss of the batch."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None  # whether a label counts; where it does not, the scores are zero
    aux_loss: Tensor | None = None


def score(log_probs: Tensor, targets: Tensor, options: ScoreOptions) -> Scores:
    """The scores in the order of `SCORES`: the readable reference.

    `log_probs` (n, V) are the mixture's, `targets` (n,) class indices.
    """
    logits = log_probs if options.temperature == 1 else log_probs / options.temperature
    if options.temperature != 1:
        log_probs = F.log_softmax(logits, dim=-1)
    wanted = options.wanted
    return (
        log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        -(log_probs.exp() * log_probs).sum(-1) if "entropy" in wanted else None,
        torch.logsumexp(2 * log_probs.detach(), dim=-1) if "log_sum_sq_probs" in wanted else None,
        logits.detach().mean(-1) if "mean_logits" in wanted else None,
        log_probs.argmax(-1) == targets if "is_top1" in wanted else None,
    )


@torch.compiler.disable
def token_scores(
    latents: Latents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    targets: Tensor,
    options: ScoreOptions,
    *,
    decoder_bias: Tensor | None = None,
    softcap: float | None = None,
) -> Scores:
    """Equivalent to: `score(mos_log_probs(latents, prior_logits, decoder_weight), targets, options)`.

    A chunk of tokens at a time: one matmul of (N K) x E x V, and three more for the gradient of `log_probs`. Autograd
    through the readable maths makes the gradient of `entropy`, and at a temperature other than 1 that of `log_probs`.
    The arguments are those of `mos_cross_entropy`; no target may be ignored. The scores are in fp32 (fp64 for fp64).
    """
    inputs = LossInputs(prior_logits, decoder_weight, decoder_bias, latents)
    work = LossOptions(softcap, ignore_index=-100, chunk_size=None, work_dtype=work_dtype_of(latents))
    return TokenScoring.apply(options, work, latents.form, targets, *inputs.flat())


class TokenScoring(torch.autograd.Function):
    """`token_scores`."""

    @staticmethod
    def forward(
        ctx: Any,
        options: ScoreOptions,
        work: LossOptions,
        form: str,
        targets: Tensor,
        *tensors: Tensor | None,
    ) -> Scores:
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in the backward pass
        ctx.save_for_backward(targets, *tensors)
        ctx.options, ctx.work, ctx.form = options, work, form
        inputs = LossInputs.read(form, tensors)
        chunks = [
            score(log_probs_of(inputs, tokens, work, infer_log_probs), targets[tokens], options)
            for tokens in token_chunks(inputs, 4)
        ]
        scores = tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.mark_non_differentiable(*(x for x in scores[2:] if x is not None))
        return scores

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, d_log_probs: Tensor | None, d_entropy: Tensor | None, *others: Any
    ) -> tuple[Tensor | None, ...]:
        targets, *tensors = ctx.saved_tensors
        if d_entropy is None and d_log_probs is None:
            return (None,) * (4 + len(tensors))
        inputs, options, work = LossInputs.read(ctx.form, tensors), ctx.options, ctx.work
        gradients: Gradients
        if d_entropy is None and options.temperature == 1:
            assert d_log_probs is not None
            _, gradients = loss_and_gradients(inputs, targets, work, wanted_of(ctx), token_weights=-d_log_probs)
        else:
            gradients = gradients_by_autograd(inputs, targets, options, work, wanted_of(ctx), d_log_probs, d_entropy)
        return (None, None, None, None, *in_dtype_of(inputs, gradients))


def gradients_by_autograd(
    inputs: LossInputs,
    targets: Tensor,
    options: ScoreOptions,
    work: LossOptions,
    wanted: ForEachInput[bool],
    d_log_probs: Tensor | None,
    d_entropy: Tensor | None,
) -> Gradients:
    """The gradients of both scores, summed in fp32 or wider."""
    leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in inputs.flat()]
    wanted_leaves = [x for x, want in zip(leaves, wanted.flat(), strict=True) if x is not None and want]
    totals = [torch.zeros_like(x, dtype=widen(x[:0]).dtype) for x in wanted_leaves]
    for tokens in token_chunks(inputs, AUTOGRAD_BYTES_PER_LOGIT):
        with torch.enable_grad():
            log_probs = log_probs_of(LossInputs.read(inputs.latents.form, leaves), tokens, work, mos_log_probs)
            scores = score(log_probs, targets[tokens], options)
        pairs = [(x, d[tokens]) for x, d in zip(scores, (d_log_probs, d_entropy), strict=False) if d is not None]
        outputs, d_outputs = zip(*pairs, strict=True)
        for total, gradient in zip(totals, torch.autograd.grad(outputs, wanted_leaves, d_outputs), strict=True):
            total += gradient
    remaining = iter(totals)
    return ForEachInput.read([next(remaining) if want else None for want in wanted.flat()])


def token_chunks(inputs: LossInputs, bytes_per_logit: int) -> list[slice]:
    """Slices of tokens; at least one, so that a batch without tokens has scores too."""
    (N, K), V = inputs.prior_logits.shape, inputs.decoder_weight.shape[0]
    size = tokens_per_chunk(K, V, bytes_per_logit, inputs.prior_logits.device)
    return [slice(start, start + size) for start in range(0, max(N, 1), size)]


def log_probs_of(inputs: LossInputs, tokens: slice, work: LossOptions, log_probs: Callable[..., Tensor]) -> Tensor:
    dtype = work.work_dtype
    latents, weight = inputs.latents[tokens].to(dtype), inputs.decoder_weight.to(dtype)
    bias = None if inputs.decoder_bias is None else inputs.decoder_bias.to(dtype)
    with torch.autocast(inputs.prior_logits.device.type, enabled=False):
        return log_probs(latents, inputs.prior_logits[tokens], weight, decoder_bias=bias, softcap=work.softcap)
