"""The loss of the mixture of softmaxes at the cost of its matrix products.

    N tokens, n of them in a chunk, K mixtures, V classes
    component_nll    = logsumexp_V(component_logits) - component_logits[target]        (n, K)
    nll              = -logsumexp_K(log_gate - component_nll)                          (n,)
    responsibilities = softmax_K(log_gate - component_nll)                             (n, K)
    d component_logits = responsibilities_k * (softmax(component_logits_k) - onehot)   (n, K, V), never stored whole
    d prior_logits     = softmax(prior_logits) - responsibilities                      (n, K)

The gradients of a chunk need its own forward pass alone. So autograd's forward pass makes them, in one reused buffer
of (n K, V), and its backward pass hands them over: three matmuls of (N K) x D x V, two where the decoder is frozen,
one without gradients, in fp16 one more; on a shortlist of N x D x V. `full_loss` and `shortlist_loss` are all of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mos_decoder import ChunkBuffers, Decoder, WholeVocabulary, cap_, split
from .mos_log_probs import REDUCTIONS, Latents, check_shapes, divisor, reduce, split_latents
from .mos_matmul import Accumulator, multiply
from .mos_shortlist import mix_on_shortlist_


def mos_cross_entropy(
    latents: Latents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    targets: Tensor,
    *,
    decoder_bias: Tensor | None = None,
    softcap: float | None = None,
    shortlist_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    shard: Any = None,
    widening: Tensor | None = None,
) -> Tensor:
    """Equivalent to: `F.nll_loss(mos_log_probs(latents, prior_logits, decoder_weight), targets)`.

    Exact, in log space, and without an (N, K, V) or (N, V) tensor. Under autocast the matmuls run in its dtype.

    Args:
        latents, prior_logits, decoder_weight, decoder_bias, softcap, shortlist_size: as in `mos_log_probs`, for N
            tokens: latents (N, K, D), or on a shortlist a mean (N, D) and offsets (N, K, D); prior_logits (N, K).
        targets: (N,), integer class indices, or `ignore_index`.
        ignore_index: targets of this value have no loss and no gradient, and cost nothing.
        reduction: `"mean"` over the targets that are not ignored, `"sum"`, or `"none"`. With `"none"` the backward
            pass computes the component logits again, as their gradients are weighted token by token; in fp16 always,
            as a loss scale must multiply the gradients before they are rounded.
        shard: the vocabulary shard whose rows `decoder_weight` and `decoder_bias` hold (`VocabularyShard`). Each
            process gets the whole loss, and the whole gradient of all inputs but the decoder's.
        widening: (D, r), for offsets (N, K, r) in place of `offsets @ widening.T`; the loss widens none of them.

    Returns:
        The negative log-likelihood in nats, in fp32 (fp64 for fp64): a scalar, or (N,) for `"none"`, zero where
        ignored. If every target is ignored, zero with zero gradients. Differentiable once. ValueError where shapes,
        dtypes or options do not fit, or a target is out of range (other devices assert).

    Source: arXiv 1711.03953, section 2.3; gradients in the forward pass as in Liger's, arXiv 2410.10989.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, given {reduction!r}")
    latents, offsets = split_latents(latents, shortlist_size)
    inputs = LossInputs(latents, offsets, prior_logits, decoder_weight, decoder_bias, widening)
    _check_inputs(inputs, targets, ignore_index, decoder_weight.shape[0] if shard is None else shard.num_classes)
    options = LossOptions(softcap, shortlist_size, ignore_index, work_dtype_of(latents), shard)
    if torch.compiler.is_compiling() and shard is None:
        return apply_when_compiling(options, reduction, targets, *inputs)
    if not torch.is_grad_enabled():  # autograd would still say that gradients are needed
        inputs = LossInputs(*(None if x is None else x.detach() for x in inputs))
    return MoSCrossEntropy.apply(options, reduction, targets, *inputs)


class LossInputs(NamedTuple):
    """The inputs of the loss that can have gradients; the gradients and the wanted ones come in the same order."""

    latents: Any  # (N, K, D), or on a shortlist the mean latent (N, D)
    offsets: Any  # (N, K, D) on a shortlist, or (N, K, r) with a widening, else None
    prior_logits: Any  # (N, K)
    decoder_weight: Any  # (V, D)
    decoder_bias: Any  # (V,), or None
    widening: Any  # (D, r), or None


class LossOptions(NamedTuple):
    softcap: float | None
    shortlist_size: int | None
    ignore_index: int
    work_dtype: torch.dtype  # of the matmuls
    shard: Any = None  # the shard whose rows the decoder holds; `None`: it holds all rows

    def waits(self, reduction: str) -> bool:
        """Whether the gradients wait for the weights of the tokens, which the backward pass brings."""
        return reduction == "none" or self.work_dtype == torch.float16  # for its loss scale


@torch.no_grad()
def full_loss(
    inputs: LossInputs, targets: Tensor, options: LossOptions, wanted: LossInputs, token_weights: Tensor | None = None
) -> tuple[Tensor, LossInputs]:
    """Each token's nll (N,), and the `wanted` gradients of the sum of `token_weights` (N,) times nll."""
    latents, decoder, log_gate, kept, weights = _prepare(inputs, targets, options, token_weights)
    N, K, _ = latents.shape
    wants_any = any(wanted)
    nll = log_gate.new_zeros(N)
    d_latents = torch.zeros_like(latents) if wanted.latents else None
    d_prior = torch.zeros_like(log_gate) if wanted.prior_logits else None
    d_weight = Accumulator(decoder.weight, wanted.decoder_weight, decoder.sum_dtype)
    d_bias = log_gate.new_zeros(decoder.weight.shape[0]) if wanted.decoder_bias else None
    buffers = ChunkBuffers.allocate(kept.shape[0], K, decoder, wants_any, wanted.decoder_weight)
    for tokens in split(kept, buffers.size, of=N):
        rows = latents[tokens].flatten(0, 1)  # (n K, D)
        target_rows = targets[tokens].long().repeat_interleave(K).unsqueeze(1)  # (n K, 1)
        logits, half, slope = buffers.rows(rows.shape[0])  # (n K, V) each
        decoder.write_logits(rows, logits, half)
        cap_(logits, decoder.softcap, slope)
        component_nll = decoder.vocabulary.softmax_(logits, target_rows).view(-1, K)  # logits become probabilities
        log_joint = log_gate[tokens] - component_nll
        chunk_nll = -torch.logsumexp(log_joint, dim=-1, keepdim=True)
        nll[tokens] = chunk_nll.squeeze(1)
        if not wants_any:
            continue
        responsibilities = torch.exp(log_joint + chunk_nll)  # (n, K)
        token_weight = weights[tokens]  # (n, 1)
        row_weights = (responsibilities * token_weight).view(-1, 1)  # (n K, 1)
        error = decoder.vocabulary.subtract_targets_(logits, target_rows)
        if slope is not None:
            error.mul_(slope)
        if d_prior is not None:
            d_prior[tokens] = (log_gate[tokens].exp() - responsibilities) * token_weight
        if d_bias is not None:
            d_bias.addmv_(error.t(), row_weights.squeeze(1))
        d_rows = _backward_of_decoder(error, row_weights, half, rows, decoder, d_latents is not None, d_weight)
        if d_latents is not None:
            d_latents[tokens] = d_rows.view(-1, *latents.shape[1:])
    decoder.vocabulary.sum_(d_latents)
    return nll, LossInputs(d_latents, None, d_prior, d_weight.result(), d_bias, None)


@torch.no_grad()
def shortlist_loss(
    inputs: LossInputs, targets: Tensor, options: LossOptions, wanted: LossInputs, token_weights: Tensor | None = None
) -> tuple[Tensor, LossInputs]:
    """As `full_loss`, for components that differ on a shortlist. `mos_shortlist.py` has the maths."""
    assert options.shortlist_size is not None
    mean_latents, decoder, log_gate, kept, weights = _prepare(inputs, targets, options, token_weights)
    offsets = inputs.offsets.to(options.work_dtype)
    widening = None if inputs.widening is None else inputs.widening.to(options.work_dtype)
    if widening is not None:
        decoder = decoder._replace(narrow=multiply(decoder.weight, widening.t()))
    wants_any = any(wanted)
    nll = log_gate.new_zeros(mean_latents.shape[0])
    d_mean = torch.zeros_like(mean_latents) if wanted.latents else None
    d_offsets = torch.zeros_like(offsets) if wanted.offsets else None
    d_prior = torch.zeros_like(log_gate) if wanted.prior_logits else None
    d_weight = Accumulator(decoder.weight, wanted.decoder_weight, decoder.sum_dtype)
    wants_rows = wanted.decoder_weight or wanted.widening
    d_narrow = d_weight if decoder.narrow is None else Accumulator(decoder.narrow, wants_rows, decoder.sum_dtype)
    d_bias = log_gate.new_zeros(decoder.weight.shape[0]) if wanted.decoder_bias else None
    buffers = ChunkBuffers.allocate(kept.shape[0], 1, decoder, wants_any, wanted.decoder_weight)
    for tokens in split(kept, buffers.size, of=nll.shape[0]):
        rows, chunk_offsets, chunk_gate = mean_latents[tokens], offsets[tokens], log_gate[tokens]
        target_rows = targets[tokens].long().unsqueeze(1)  # (n, 1)
        logits, half, slope = buffers.rows(rows.shape[0])  # (n, V) each
        decoder.write_logits(rows, logits, half)
        on_list = mix_on_shortlist_(logits, chunk_offsets, chunk_gate, decoder, options.shortlist_size, slope)
        chunk_nll = decoder.vocabulary.softmax_(logits, target_rows)  # logits become probabilities
        nll[tokens] = chunk_nll.squeeze(1)
        if not wants_any:
            continue
        token_weight = weights[tokens]  # (n, 1)
        error = decoder.vocabulary.subtract_targets_(logits, target_rows)
        shares = on_list.weights.div_(on_list.total.clamp(min=1))  # (n, K, M); 0 for a class at -inf
        d_logits = shares.mul_(error.gather(1, on_list.shortlist).unsqueeze(1))
        if d_prior is not None:
            d_log_gate = d_logits.sum(-1)
            decoder.vocabulary.sum_(d_log_gate)
            d_prior[tokens] = (d_log_gate - chunk_gate.exp() * d_log_gate.sum(-1, keepdim=True)) * token_weight
        if slope is not None and on_list.slope is not None:
            d_logits.mul_(on_list.slope)
            error.mul_(slope).scatter_(1, on_list.shortlist, d_logits.sum(1))
        d_differences = d_logits.mul_(token_weight.unsqueeze(-1))
        if on_list.is_in is not None:
            d_differences.mul_(on_list.is_in.unsqueeze(1))
        d_differences = d_differences.to(options.work_dtype)
        if d_bias is not None:
            d_bias.addmv_(error.t(), token_weight.squeeze(1))
        d_rows = _backward_of_decoder(error, token_weight, half, rows, decoder, d_mean is not None, d_weight)
        if d_mean is not None:
            d_mean[tokens] = d_rows
        d_chunk = torch.empty_like(chunk_offsets)
        for part, rows_of_list in decoder.rows_of(on_list.shortlist):
            torch.bmm(d_differences[part], rows_of_list, out=d_chunk[part])
            if wants_rows:
                torch.bmm(d_differences[part].transpose(1, 2), chunk_offsets[part], out=rows_of_list)
                d_narrow.add_rows(on_list.shortlist[part].flatten(), rows_of_list.flatten(0, 1))
        if d_offsets is not None:
            d_offsets[tokens] = d_chunk
    d_widening = None
    if widening is not None and (of_narrow := d_narrow.result()) is not None:
        of_narrow = of_narrow.to(options.work_dtype)
        d_weight.add_product(of_narrow, widening.t())
        d_widening = multiply(of_narrow.t(), decoder.weight.t()).t().to(decoder.sum_dtype) if wanted.widening else None
    for gradient in (d_mean, d_offsets, d_widening):
        decoder.vocabulary.sum_(gradient)
    return nll, LossInputs(d_mean, d_offsets, d_prior, d_weight.result(), d_bias, d_widening)


def loss_of(options: LossOptions) -> Callable[..., tuple[Tensor, LossInputs]]:
    return full_loss if options.shortlist_size is None else shortlist_loss


def _prepare(
    inputs: LossInputs, targets: Tensor, options: LossOptions, token_weights: Tensor | None
) -> tuple[Tensor, Decoder, Tensor, Tensor, Tensor]:
    """Latents and decoder in the dtype of the matmuls, log_gate (N, K), the tokens that count, all weights (N, 1)."""
    latents, weight = inputs.latents.to(options.work_dtype), inputs.decoder_weight.to(options.work_dtype)
    bias = None if inputs.decoder_bias is None else inputs.decoder_bias.to(options.work_dtype)
    sum_dtype = torch.promote_types(inputs.latents.dtype, torch.float32)
    vocabulary = WholeVocabulary(weight.shape[0]) if options.shard is None else options.shard
    decoder = Decoder(weight, bias, options.softcap, vocabulary, sum_dtype)
    log_gate = F.log_softmax(inputs.prior_logits.to(sum_dtype), dim=-1)
    weights = torch.ones_like(log_gate[:, 0]) if token_weights is None else token_weights.to(sum_dtype)
    return latents, decoder, log_gate, (targets != options.ignore_index).nonzero().squeeze(1), weights.unsqueeze(1)


def _backward_of_decoder(
    error: Tensor, weights: Tensor, half: Any, rows: Tensor, decoder: Decoder, wants_rows: bool, d_weight: Accumulator
) -> Any:
    """The gradient of the rows (R, D), of that of their logits, `weights * error`; adds the decoder's.

    In fp32 and wider that product (R, V) is never made: the row weights (R, 1) go on the narrow side of each matmul.
    In half precision they join the error when it is rounded.
    """
    if half is not None:
        error, left = torch.mul(error, weights, out=half), rows
        d_rows = multiply(error, decoder.weight.t()) if wants_rows else None
    else:
        left = rows * weights
        d_rows = multiply(error, decoder.weight.t()) * weights if wants_rows else None
    d_weight.add_product(error.t(), left)
    return d_rows


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Like torch's `once_differentiable`, which raises only if the incoming gradient requires one itself."""

    def checked(ctx: Any, *d_outputs: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            once = "as the loss with labels is differentiable once, given True. Use the loss of outputs.logits"
            raise RuntimeError(f"create_graph: expected False, {once}")
        return backward(ctx, *d_outputs)

    return checked


class MoSCrossEntropy(torch.autograd.Function):
    """`mos_cross_entropy` without its checks."""

    @staticmethod
    def forward(ctx: Any, options: LossOptions, reduction: str, targets: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(targets, *tensors)
        ctx.options, ctx.reduction = options, reduction
        wanted = LossInputs(*(wants and not options.waits(reduction) for wants in ctx.needs_input_grad[3:]))
        with torch.autocast(targets.device.type, enabled=False):
            nll, ctx.gradients = loss_of(options)(LossInputs(*tensors), targets, options, wanted)
        return reduce(nll, targets != options.ignore_index, reduction)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        targets, *tensors = ctx.saved_tensors
        inputs, options, wanted = LossInputs(*tensors), ctx.options, LossInputs(*ctx.needs_input_grad[3:])
        gradients, ctx.gradients = ctx.gradients, None  # handed over, so that they can be scaled in place
        weights = grad_output / divisor(targets != options.ignore_index, ctx.reduction)
        with torch.autocast(targets.device.type, enabled=False):
            if (waits := options.waits(ctx.reduction)) or gradients is None:  # None: a second pass, of the same bits
                token_weights = weights.expand(targets.shape) if waits else None
                _, gradients = loss_of(options)(inputs, targets, options, wanted, token_weights)
            if not waits:
                gradients = [None if x is None else x.mul_(weights) for x in gradients]
        return (None, None, None, *gradients_for(inputs, gradients))


# A graph break; `hf_mos.training.compiled_loss` puts an operator in its place, which torch.compile does not open.
apply_when_compiling: Callable[..., Tensor] = torch.compiler.disable(MoSCrossEntropy.apply)


def gradients_for(inputs: LossInputs, gradients: Any) -> tuple[Tensor | None, ...]:
    """The gradients, each in the dtype of its input."""
    pairs = zip(inputs, gradients, strict=True)
    return tuple(None if x is None or gradient is None else gradient.to(x.dtype) for x, gradient in pairs)


def work_dtype_of(latents: Tensor) -> torch.dtype:
    """The dtype of the matmuls: that of autocast where it is on, else that of the latents."""
    device_type = latents.device.type
    if torch.is_autocast_enabled(device_type) and latents.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return latents.dtype


def _check_inputs(inputs: LossInputs, targets: Tensor, ignore_index: int, num_classes: int) -> None:
    latents, offsets, prior_logits, decoder_weight, bias, widening = inputs
    if prior_logits.dim() != 2:
        raise ValueError(f"prior_logits: expected (N, K), given {tuple(prior_logits.shape)}")
    if widening is not None:
        if offsets is None or widening.shape != (latents.shape[-1], offsets.shape[-1]):
            raise ValueError(f"widening: expected (D, r) with offsets (N, K, r), given {tuple(widening.shape)}")
        offsets = offsets[..., :1].expand(*offsets.shape[:-1], widening.shape[0])
    check_shapes(latents, offsets, prior_logits, decoder_weight, bias)
    if targets.shape != prior_logits.shape[:1]:
        raise ValueError(f"targets: expected ({prior_logits.shape[0]},), given {tuple(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets: expected integer class indices, given {targets.dtype}")
    if latents.dtype != decoder_weight.dtype and not torch.is_autocast_enabled(targets.device.type):
        raise ValueError(f"latents: expected the decoder's {decoder_weight.dtype}, given {latents.dtype}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (targets != ignore_index) & ((targets < 0) | (targets >= num_classes))
        if outside.any():
            given = int(targets[outside][0])
            raise ValueError(f"targets: expected class indices below {num_classes}, or {ignore_index}, given {given}")
