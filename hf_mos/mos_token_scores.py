"""What trainers of preferences and of rewards ask about each token, without a tensor of (N, K, V) or (N, V).

    p                 softmax(mixture's log-probabilities / temperature)                    (N, V)
    log_probs         log p(target)                                                         (N,)
    entropy           -sum_V p log p, in nats                                               (N,)
    log_sum_sq_probs  log sum_V p^2                                                         (N,)
    mean_logits       mean_V of the mixture's log-probabilities / temperature               (N,)
    is_top1           whether the target is the most likely class                           (N,)

The names are those of TRL, whose trainers read them. `log_probs` and `entropy` are differentiable.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput

from .mos_chunks import LossOptions, loss_and_gradients, tokens_per_chunk
from .mos_inference import infer_log_probs
from .mos_latents import SubspaceLatents
from .mos_log_probs import mos_log_probs, widen

SCORES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ScoreOptions(NamedTuple):
    temperature: float = 1.0  # acts on the mixture
    wanted: tuple[str, ...] = SCORES[:1]  # `log_probs` are always computed


@dataclass
class TokenScores(ModelOutput):
    """Scores of each token, `None` where they are not wanted, and with them what a model knows of its batch."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None  # whether a label counts; the scores are zero where it does not
    aux_loss: Tensor | None = None


def score(log_probs: Tensor, targets: Tensor, options: ScoreOptions) -> tuple[Tensor | None, ...]:
    """The scores in the order of `SCORES`, in their readable form.

    Args:
        log_probs: (n, V), of the mixture.
        targets: (n,), class indices.
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
    latents: Tensor | SubspaceLatents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    targets: Tensor,
    options: ScoreOptions,
    *,
    decoder_bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Equivalent to: `score(mos_log_probs(latents, prior_logits, decoder_weight), targets, options)`.

    A chunk of tokens at a time: one product of (N K) x E x V, and three more for the gradient of `log_probs`. That of
    `entropy`, and with a temperature other than 1 that of `log_probs`, is by autograd through the readable maths.

    Args:
        latents, prior_logits, decoder_weight, decoder_bias, softcap: as in `mos_cross_entropy`.
        targets: (N,), class indices; none that is ignored.
        options: which scores, at which temperature.

    Returns:
        The scores (N,) in the order of `SCORES`, in fp32 (fp64 for fp64), `None` where not wanted.
    """
    latent_tensors = latents if isinstance(latents, SubspaceLatents) else (latents,)
    device_type, dtype = targets.device.type, latent_tensors[0].dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    work = LossOptions(softcap, ignore_index=-100, chunk_size=None, work_dtype=dtype)
    return TokenScoring.apply(options, work, prior_logits, decoder_weight, decoder_bias, targets, *latent_tensors)


class TokenScoring(torch.autograd.Function):
    """`token_scores`."""

    @staticmethod
    def forward(ctx: Any, options: ScoreOptions, work: LossOptions, *tensors: Any) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in the backward pass
        ctx.save_for_backward(*tensors)
        ctx.options, ctx.work = options, work
        targets = tensors[3]
        chunks = [
            score(log_probs_of(tensors, tokens, work, infer_log_probs), targets[tokens], options)
            for tokens in token_chunks(tensors, 4)
        ]
        scores = tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.mark_non_differentiable(*(x for x in scores[2:] if x is not None))
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_probs: Tensor | None, d_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        tensors, options, work = ctx.saved_tensors, ctx.options, ctx.work
        gradients: tuple[Tensor | None, ...]
        needs = ctx.needs_input_grad[2:]
        wanted = (*needs[:3], *needs[4:])
        if d_entropy is None and d_log_probs is None:
            return (None,) * (2 + len(tensors))
        if d_entropy is None and options.temperature == 1:
            assert d_log_probs is not None
            gradients = loss_and_gradients(tensors, work, wanted, token_weights=-d_log_probs)[1]
        else:
            gradients = gradients_by_autograd(tensors, options, work, wanted, d_log_probs, d_entropy)
        inputs = (*tensors[:3], *tensors[4:])
        prior, weight, bias, *latents = (
            None if gradient is None else gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True)
        )
        return (None, None, prior, weight, bias, None, *latents)


def gradients_by_autograd(
    tensors: tuple[Any, ...],
    options: ScoreOptions,
    work: LossOptions,
    wanted: tuple[bool, ...],
    d_log_probs: Tensor | None,
    d_entropy: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of both scores, in the order prior logits, weight, bias, latents; summed in fp32 or wider."""
    leaves: list[Any] = [None if x is None else x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    inputs = [x for x, want in zip((*leaves[:3], *leaves[4:]), wanted, strict=True) if want]
    totals = [torch.zeros_like(x, dtype=widen(x[:0]).dtype) for x in inputs]
    for tokens in token_chunks(tensors, 24):
        with torch.enable_grad():
            log_probs = log_probs_of(leaves, tokens, work, mos_log_probs)
            scores = score(log_probs, tensors[3][tokens], options)
        pairs = [(x, d[tokens]) for x, d in zip(scores, (d_log_probs, d_entropy), strict=False) if d is not None]
        outputs, d_outputs = zip(*pairs, strict=True)
        for total, gradient in zip(totals, torch.autograd.grad(outputs, inputs, d_outputs), strict=True):
            total += gradient
    remaining = iter(totals)
    return tuple(next(remaining) if want else None for want in wanted)


def token_chunks(tensors: tuple[Any, ...], bytes_per_logit: int) -> list[slice]:
    """At least one, so that a batch without tokens has scores too."""
    (N, K), V = tensors[0].shape, tensors[1].shape[0]
    size = tokens_per_chunk(K, V, bytes_per_logit, tensors[0].device)
    return [slice(start, start + size) for start in range(0, max(N, 1), size)]


def log_probs_of(tensors: Any, tokens: slice, work: LossOptions, log_probs: Any) -> Tensor:
    prior_logits, weight, bias, _, *latent_tensors = tensors
    dtype = work.work_dtype
    first, *others = (x.to(dtype) for x in latent_tensors)
    latents = SubspaceLatents(first[tokens], others[0][tokens], others[1]) if others else first[tokens]
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(first.device.type, enabled=False):
        return log_probs(latents, prior_logits[tokens], weight.to(dtype), decoder_bias=bias, softcap=work.softcap)
