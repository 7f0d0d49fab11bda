"""The scores of each token that preference and reward trainers need, without a tensor of (N, K, V) or (N, V).

    p                 softmax(mixture's log-probabilities / temperature)                    (N, V)
    log_probs         log p(target)                                                         (N,)
    entropy           -sum_V p log p, in nats                                               (N,)
    log_sum_sq_probs  log sum_V p^2                                                         (N,)
    mean_logits       mean_V of the mixture's log-probabilities / temperature               (N,)
    is_top1           whether the target is the most likely class                           (N,)

The names are those of TRL, whose trainers read them. `log_probs` and `entropy` are differentiable. TRL's
`add_fused_lm_head` assigns a forward of the layers and one softmax, which its trainers call with `fused_lm_head=True`.
A mixture keeps its own forward, and answers that call with its token scores. Only this package can, as this module
does not travel with a checkpoint.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..remote_code.modeling_mos import MoSForCausalLM
from ..remote_code.mos_decoder import AUTOGRAD_BYTES_PER_LOGIT, tokens_per_chunk, upcast
from ..remote_code.mos_head import MoSLMHead
from ..remote_code.mos_log_probs import Latents, count_items, infer_log_probs, mos_log_probs, split_latents
from ..remote_code.mos_loss import LossInputs, LossOptions, differentiable_once, gradients_for, loss_of, work_dtype_of

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


def score(log_probs: Tensor, targets: Tensor, options: ScoreOptions, are_log_probs: bool = True) -> Scores:
    """The scores in the order of `SCORES`: the readable reference.

    `log_probs` (n, V) are the mixture's, or logits where they are no log-probabilities; `targets` (n,) class indices.
    """
    logits = log_probs if options.temperature == 1 else log_probs / options.temperature
    if options.temperature != 1 or not are_log_probs:
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
    shortlist_size: int | None = None,
) -> Scores:
    """Equivalent to: `score(mos_log_probs(latents, prior_logits, decoder_weight), targets, options)`.

    A chunk of tokens at a time: one matmul of (N K) x D x V, and three more for the gradient of `log_probs`. Autograd
    through the readable maths makes the gradient of `entropy`, and at a temperature other than 1 that of `log_probs`.
    The arguments are those of `mos_cross_entropy`; no target may be ignored. The scores are in fp32 (fp64 for fp64).
    """
    latents, offsets = split_latents(latents, shortlist_size)
    work = LossOptions(softcap, shortlist_size, -100, work_dtype_of(latents))
    inputs = LossInputs(latents, offsets, prior_logits, decoder_weight, decoder_bias, None)
    return TokenScoring.apply(options, work, targets, *inputs)


class TokenScoring(torch.autograd.Function):
    """`token_scores`."""

    @staticmethod
    def forward(
        ctx: Any, options: ScoreOptions, work: LossOptions, targets: Tensor, *tensors: Tensor | None
    ) -> Scores:
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in the backward pass
        ctx.save_for_backward(targets, *tensors)
        ctx.options, ctx.work = options, work
        inputs = LossInputs(*tensors)
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
            return (None,) * (3 + len(tensors))
        inputs, work, wanted = LossInputs(*tensors), ctx.work, LossInputs(*ctx.needs_input_grad[3:])
        if d_entropy is None and ctx.options.temperature == 1:
            assert d_log_probs is not None
            with torch.autocast(targets.device.type, enabled=False):
                _, gradients = loss_of(work)(inputs, targets, work, wanted, -d_log_probs)
        else:
            d_scores = (d_log_probs, d_entropy)
            gradients = gradients_by_autograd(inputs, targets, ctx.options, work, wanted, d_scores)
        return (None, None, None, *gradients_for(inputs, gradients))


def gradients_by_autograd(
    inputs: LossInputs,
    targets: Tensor,
    options: ScoreOptions,
    work: LossOptions,
    wanted: LossInputs,
    d_scores: tuple[Tensor | None, Tensor | None],
) -> LossInputs:
    """The gradients of both scores, summed in fp32 or wider."""
    leaves = LossInputs(*(None if x is None else x.detach().requires_grad_() for x in inputs))
    wanted_leaves = [x for x, want in zip(leaves, wanted, strict=True) if x is not None and want]
    totals = [torch.zeros_like(x, dtype=upcast(x[:0]).dtype) for x in wanted_leaves]
    for tokens in token_chunks(inputs, AUTOGRAD_BYTES_PER_LOGIT):
        with torch.enable_grad():
            scores = score(log_probs_of(leaves, tokens, work, mos_log_probs), targets[tokens], options)
        pairs = [(x, d[tokens]) for x, d in zip(scores, d_scores, strict=False) if d is not None]
        outputs, d_outputs = zip(*pairs, strict=True)
        for total, gradient in zip(totals, torch.autograd.grad(outputs, wanted_leaves, d_outputs), strict=True):
            total += gradient
    remaining = iter(totals)
    pairs_of = zip(leaves, wanted, strict=True)
    return LossInputs(*(next(remaining) if x is not None and want else None for x, want in pairs_of))


def token_chunks(inputs: LossInputs, bytes_per_logit: int) -> list[slice]:
    """Slices of tokens; at least one, so that a batch without tokens has scores too."""
    (N, K), V = inputs.prior_logits.shape, inputs.decoder_weight.shape[0]
    size = tokens_per_chunk(K, V, bytes_per_logit, inputs.prior_logits.device)
    return [slice(start, start + size) for start in range(0, max(N, 1), size)]


def log_probs_of(inputs: LossInputs, tokens: slice, work: LossOptions, log_probs: Callable[..., Tensor]) -> Tensor:
    latents, offsets = inputs.latents[tokens].to(work.work_dtype), None
    if inputs.offsets is not None:
        offsets = inputs.offsets[tokens].to(work.work_dtype)
    weight, bias = (None if x is None else x.to(work.work_dtype) for x in (inputs.decoder_weight, inputs.decoder_bias))
    with torch.autocast(latents.device.type, enabled=False):
        return log_probs(
            latents if offsets is None else (latents, offsets),
            inputs.prior_logits[tokens],
            weight,
            decoder_bias=bias,
            softcap=work.softcap,
            shortlist_size=work.shortlist_size,
        )


def read_score_options(function: Any) -> ScoreOptions:
    """The options in the forward of the layers and one softmax that TRL's `add_fused_lm_head` assigns to a model.

    Raises:
        ValueError: a trainer of TRL is about to multiply the last hidden states by the decoder's weight, or its
            version is another.
    """
    if (function.__module__ or "").startswith("liger_kernel."):
        raise ValueError(
            "forward: expected liger_kernel_config={'fused_linear_cross_entropy': False}, as Liger's fused loss is "
            "that of one softmax, given Liger's forward"
        )
    if "_ForwardRedirection" in function.__qualname__:
        raise ValueError(
            "model: expected one softmax with this trainer of TRL, whose loss is made of the last hidden states and "
            "the weight of the output embeddings, given a mixture, of which it would train a part. Make the loss of "
            "outputs.logits instead."
        )
    given = inspect.getclosurevars(function).nonlocals
    if given.get("cast_lm_head_to_fp32"):
        raise ValueError(
            "cast_lm_head_to_fp32: expected False, as it replaces the forward of the head by one softmax, given True. "
            "The mixture's log-probabilities are in float32 anyway."
        )
    if not {"temperature", "outputs"} <= given.keys() or not set(given["outputs"]) <= set(SCORES):
        raise ValueError(
            f"forward: expected the fused head of TRL 1.16, whose options are temperature and outputs of {SCORES}, "
            f"given one with {sorted(given)} and {given.get('outputs')}. Install 'trl>=1.16,<1.17'."
        )
    return ScoreOptions(float(given["temperature"]), tuple(given["outputs"]))


def score_batch(
    options: ScoreOptions,
    head: Callable[..., Any],
    hidden_states: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None,
    fuses: bool,
) -> TokenScores:
    """The scores of the targets (batch, sequence) that are not -100, and their loss.

    `head` is called as a `MoSLMHead`; where it does not fuse, as somebody waits for its logits, for these.
    """
    targets = targets.to(hidden_states.device)
    counts = targets != -100
    if fuses:
        function = functools.partial(score_tokens, options)
        flat = head(hidden_states[counts], targets=targets[counts], function=function)
    else:
        flat = score(upcast(head(hidden_states)[counts]), targets[counts], options, are_log_probs=False)
    # masked_scatter stays differentiable where no label counts
    scores: dict[str, Any] = {
        name: None if part is None else part.new_zeros(counts.shape).masked_scatter(counts, part)
        for name, part in zip(SCORES, flat, strict=True)
    }
    loss = -scores["log_probs"].sum() / count_items(targets, num_items_in_batch)
    return TokenScores(loss=loss, label_mask=counts, **scores)


def score_tokens(
    options: ScoreOptions,
    head: MoSLMHead,
    latents: Latents,
    prior_logits: Tensor,
    targets: Tensor,
    decoder: nn.Module | None,
) -> Scores:
    """The scores of N targets, by a decoder that is read where it can be."""
    if options == ScoreOptions() and not torch.is_grad_enabled():  # the loss makes no distribution
        nll = head.loss(latents, prior_logits, targets, decoder, reduction="none")
        return (-nll, *(None,) * (len(SCORES) - 1))
    tensors = head.read_decoder(decoder)
    if tensors is not None and tensors[2] is None:
        given: dict[str, Any] = {"softcap": head.softcap, "shortlist_size": head.shortlist_size}
        return token_scores(latents, prior_logits, tensors[0], targets, options, decoder_bias=tensors[1], **given)

    def chunk_scores(latents: Latents, prior_logits: Tensor, targets: Tensor) -> Scores:
        return score(head.log_probs(latents, prior_logits, decoder), targets, options)

    parts = head.in_chunks(chunk_scores, latents, prior_logits, targets)
    return tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))


# What a mixture does with the forward that TRL assigns to it; the code beside a checkpoint refuses it.
MoSForCausalLM.read_fused_forward = staticmethod(read_score_options)  # type: ignore[assignment]
MoSForCausalLM.score_batch = staticmethod(score_batch)  # type: ignore[assignment]
MoSForCausalLM.score_options = ScoreOptions()
