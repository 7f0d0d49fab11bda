"""The loss of the mixture of softmaxes at the cost of its matrix products.

    N tokens, K mixtures, E latent_size, V classes
    component_nll    = logsumexp_V(component_logits) - component_logits[target]        (N, K)
    nll              = -logsumexp_K(log_prior - component_nll)                         (N,)
    responsibilities = softmax_K(log_prior - component_nll)                            (N, K)
    d component_logits = responsibilities_k * (softmax(component_logits_k) - onehot)   (N, K, V), never stored
    d prior_logits     = softmax(prior_logits) - responsibilities                      (N, K)

The gradients need nothing that the forward pass of the same tokens has not made, so they are computed there, a chunk
of tokens at a time in one reused buffer of (chunk * K, V), and handed over in the backward pass. A training step is
three products of (N K) x E x V, two when the decoder is frozen, one without gradients.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mixture_of_softmaxes import SubspaceLatents, check_shapes, widen
from .mos_projections import Tokens, projection_for

REDUCTIONS = ("mean", "sum", "none")

# Working memory of the loss. On the CPU larger chunks bring nothing more; on an accelerator larger products keep more
# of it busy, so the budget follows its memory.
CPU_BUDGET_BYTES = 64 * 2**20
MIN_BUDGET_BYTES = 256 * 2**20
DEVICE_MEMORY_SHARE = 1 / 64


def mos_cross_entropy(
    latents: Tensor | SubspaceLatents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    targets: Tensor,
    *,
    decoder_bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Equivalent to: `F.nll_loss(mos_log_probs(latents, prior_logits, decoder_weight), targets)`.

    Exact, in log space, and without an (N, K, V) or (N, V) tensor. Under autocast the products run in its dtype.

    Args:
        latents: (N, K, E), one latent for each token and component, or the [`SubspaceLatents`] that stand for them.
        prior_logits: (N, K), the raw output of the prior.
        decoder_weight: (V, E), the vocabulary projection that all components share.
        targets: (N,), integer class indices, or `ignore_index`.
        decoder_bias: (V,), or `None`.
        softcap: each component's logits become `softcap * tanh(logits / softcap)`; `None` for none.
        ignore_index: targets of this value have no loss and no gradient, and cost nothing.
        reduction: `"mean"` over the targets that are not ignored, `"sum"`, or `"none"`. With `"none"` the backward
            pass computes the component logits again, as their gradients are weighted token by token.
        chunk_size: tokens in work at a time. `None`: as many as a budget of bytes allows that is chosen from the
            device's memory.

    Returns:
        The negative log-likelihood in nats, in fp32 (fp64 for fp64): a scalar, or (N,) for `"none"`, zero where
        ignored. If every target is ignored, zero with zero gradients. Differentiable once.

    Raises:
        ValueError: shapes or dtypes do not fit together, a target is out of range (on the CPU; other devices assert),
            or an option is unknown.

    Source: Yang et al. 2018, arXiv 1711.03953, section 2.3; gradients in the forward pass as in Liger's fused linear
    cross-entropy, arXiv 2410.10989.
    """
    options = LossOptions(softcap, ignore_index, reduction, chunk_size)
    _check_arguments(latents, prior_logits, decoder_weight, targets, decoder_bias, options)
    latent_tensors = latents if isinstance(latents, SubspaceLatents) else (latents,)
    return MoSCrossEntropy.apply(prior_logits, decoder_weight, decoder_bias, targets, options, *latent_tensors)


class LossOptions(NamedTuple):
    softcap: float | None
    ignore_index: int
    reduction: str
    chunk_size: int | None


class MoSCrossEntropy(torch.autograd.Function):
    """`mos_cross_entropy` without its checks; gradients for latents, prior logits, decoder weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        prior_logits: Tensor,
        decoder_weight: Tensor,
        decoder_bias: Tensor | None,
        targets: Tensor,
        options: LossOptions,
        *latent_tensors: Tensor,
    ) -> Tensor:
        tensors = (prior_logits, decoder_weight, decoder_bias, targets, *latent_tensors)
        ctx.save_for_backward(*tensors)
        ctx.options = options
        ctx.work_dtype = _work_dtype(latent_tensors[0])
        wanted = _wanted(ctx)
        if options.reduction == "none":  # the gradients wait for each token's weight
            ctx.gradients, wanted = None, (False,) * len(wanted)
        nll, ctx.gradients = _loss_and_gradients(tensors, options, ctx.work_dtype, wanted)
        return nll if options.reduction == "none" else nll.sum() / _denominator(targets, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors, options = ctx.saved_tensors, ctx.options
        if options.reduction == "none":
            token_weights, scale = grad_output, None
            gradients = None
        else:
            token_weights, scale = None, grad_output / _denominator(tensors[3], options)
            gradients, ctx.gradients = ctx.gradients, None  # handed over, so that they can be scaled where they lie
        if gradients is None:  # also in a second backward pass through a retained graph
            _, gradients = _loss_and_gradients(tensors, options, ctx.work_dtype, _wanted(ctx), token_weights)
        inputs = (*tensors[:3], *tensors[4:])
        prior, weight, bias, *latents = (_finish(g, x, scale) for g, x in zip(gradients, inputs, strict=True))
        return (prior, weight, bias, None, None, *latents)


def _wanted(ctx: Any) -> tuple[bool, ...]:
    """Which of prior logits, decoder weight, decoder bias and the latent tensors need a gradient."""
    return (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:])


@torch.no_grad()
def _loss_and_gradients(
    tensors: tuple[Any, ...],
    options: LossOptions,
    work_dtype: torch.dtype,
    wanted: tuple[bool, ...],
    token_weights: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Each token's nll (N,), and the gradients of their sum, weighted by `token_weights` (N,) if there are any."""
    prior_logits, decoder_weight, bias, targets, *latent_tensors = tensors
    wants_prior, wants_weight, wants_bias, *wants_latents = wanted
    wants_logits = any(wanted[1:])  # whether the gradient has to pass through the component logits
    (N, K), V, device = prior_logits.shape, decoder_weight.shape[0], prior_logits.device
    sum_dtype = widen(latent_tensors[0][:0]).dtype
    with torch.autocast(device.type, enabled=False):
        cast = [tensor.to(work_dtype) for tensor in latent_tensors]
        latents = cast[0] if len(cast) == 1 else SubspaceLatents(*cast)
        weight = decoder_weight.to(work_dtype)
        projection = projection_for(latents, weight, tuple(wants_latents), wants_weight, sum_dtype)
        bias = None if bias is None else bias.to(work_dtype)
        log_prior = F.log_softmax(prior_logits.to(sum_dtype), dim=-1)
        nll = torch.zeros(N, dtype=sum_dtype, device=device)
        d_prior = torch.zeros_like(log_prior) if wants_prior else None
        d_bias = torch.zeros(V, dtype=sum_dtype, device=device) if wants_bias else None

        buffers = ChunkBuffers(V, options, work_dtype, sum_dtype, device, wants_logits)
        kept = (targets != options.ignore_index).nonzero().squeeze(1)
        size, group_size = buffers.allocate(kept.shape[0], K, projection.shared_share)
        for group in split(kept, group_size, of=N):
            projection.open(group, group_size, bias)
            for tokens, place in split_again(group, size):
                target_rows = targets[tokens].long().repeat_interleave(K).unsqueeze(1)  # (n K, 1)
                logits, half, slope = buffers.rows(target_rows.shape[0])  # (n K, V) each
                projection.logits(tokens, place, logits, half)
                if options.softcap is not None:
                    cap_(logits, options.softcap, slope)
                target_logits = logits.gather(1, target_rows)
                # softmax_ leaves softmax(component_logits) in the buffer.
                log_normalizer = softmax_(logits) if wants_logits else torch.logsumexp(logits, dim=1, keepdim=True)
                component_nll = (log_normalizer - target_logits).view(-1, K)

                log_joint = log_prior[tokens] - component_nll
                chunk_nll = -torch.logsumexp(log_joint, dim=-1, keepdim=True)
                nll[tokens] = chunk_nll.squeeze(1)
                responsibilities = torch.exp(log_joint + chunk_nll)  # (n, K)
                token_weight = 1.0 if token_weights is None else token_weights[tokens].to(sum_dtype).unsqueeze(1)
                if d_prior is not None:
                    d_prior[tokens] = (log_prior[tokens].exp() - responsibilities) * token_weight
                if not wants_logits:
                    continue
                error = logits.scatter_add_(1, target_rows, logits.new_full((), -1.0).expand_as(target_rows))
                if slope is not None:
                    error.mul_(slope)
                row_weights = (responsibilities * token_weight).view(-1, 1)  # (n K, 1)
                if d_bias is not None:
                    d_bias.addmv_(error.t(), row_weights.squeeze(1))
                if work_dtype == sum_dtype:
                    projection.backward(tokens, place, error, row_weights)
                else:
                    projection.backward(tokens, place, torch.mul(error, row_weights, out=half), None)
            if wants_logits:
                projection.close(group)
        d_latents, d_weight = projection.gradients()
        return nll, (d_prior, d_weight, d_bias, *d_latents)


class ChunkBuffers:
    """The reused buffers of (chunk_size * K, V), as large as the budget allows."""

    def __init__(
        self,
        num_classes: int,
        options: LossOptions,
        work_dtype: torch.dtype,
        sum_dtype: torch.dtype,
        device: torch.device,
        wants_logits: bool,
    ) -> None:
        self.num_classes, self.chunk_size, self.device = num_classes, options.chunk_size, device
        self.work_dtype, self.sum_dtype = work_dtype, sum_dtype
        self.has_half = work_dtype != sum_dtype
        self.has_slope = options.softcap is not None and wants_logits
        self.logits = self.half = torch.empty(0)
        self.slope: Tensor | None = None

    def allocate(self, num_tokens: int, num_mixtures: int, shared_share: float) -> tuple[int, int]:
        """Makes the buffers; returns how many tokens are in work at a time, and how many share the wide products."""
        bytes_per_logit = self.sum_dtype.itemsize * (1 + self.has_slope) + self.work_dtype.itemsize * self.has_half
        budget = budget_bytes(self.device)
        size = self.chunk_size
        if size is None:
            size = int(budget * (1 - shared_share)) // (num_mixtures * self.num_classes * bytes_per_logit)
        group_size = num_tokens
        if shared_share:
            group_size = max(size, int(budget * shared_share) // (self.num_classes * self.work_dtype.itemsize))
        group_size = even(num_tokens, group_size)
        size = even(group_size, size)
        shape = (size * num_mixtures, self.num_classes)
        self.logits = torch.empty(shape, dtype=self.sum_dtype, device=self.device)
        if self.has_half:
            self.half = torch.empty(shape, dtype=self.work_dtype, device=self.device)
        if self.has_slope:
            self.slope = torch.empty(shape, dtype=self.sum_dtype, device=self.device)
        return size, group_size

    def rows(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.logits[:count], self.half[:count], None if self.slope is None else self.slope[:count]


def even(count: int, size: int) -> int:
    """The size of parts of at most `size` that share `count` evenly, so that none is a small rest."""
    count, size = max(1, count), max(1, size)
    return -(-count // -(-count // size))


def split(kept: Tensor, size: int, of: int) -> Iterator[Tokens]:
    """The kept tokens in parts: slices where all `of` them are kept, else index tensors."""
    count = kept.shape[0]
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop) if count == of else kept[start:stop]


def split_again(group: Tokens, size: int) -> Iterator[tuple[Tokens, slice]]:
    """The tokens of a group in parts, and each part's place in the group."""
    count = group.stop - group.start if isinstance(group, slice) else group.shape[0]
    for start in range(0, count, size):
        place = slice(start, min(start + size, count))
        if isinstance(group, slice):
            yield slice(group.start + place.start, group.start + place.stop), place
        else:
            yield group[place], place


def cap_(logits: Tensor, softcap: float, slope: Tensor | None) -> None:
    """Equivalent to: `cap_logits` in place; writes its derivative at each logit to `slope`, if there is one."""
    logits.div_(softcap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1)
    logits.mul_(softcap)


def softmax_(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in place; returns the logarithm of each row's normalizer, (rows, 1).

    The normalizer is read back from the largest probability, exp(largest logit - log_normalizer), which cannot
    underflow: three passes over the buffer, where logsumexp and softmax take six and a copy of it.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    torch.softmax(logits, dim=-1, out=logits)
    return largest - logits.amax(dim=-1, keepdim=True).log()


def budget_bytes(device: torch.device) -> int:
    """Working memory for one chunk, in bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return max(MIN_BUDGET_BYTES, int(total * DEVICE_MEMORY_SHARE))
    return CPU_BUDGET_BYTES


def tokens_per_chunk(num_mixtures: int, num_classes: int, bytes_per_logit: int, device: torch.device) -> int:
    """How many tokens' component logits fit in the budget."""
    return max(1, budget_bytes(device) // (num_mixtures * num_classes * bytes_per_logit))


def _work_dtype(latents: Tensor) -> torch.dtype:
    device_type = latents.device.type
    if torch.is_autocast_enabled(device_type) and latents.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return latents.dtype


def _denominator(targets: Tensor, options: LossOptions) -> Tensor | int:
    return 1 if options.reduction == "sum" else (targets != options.ignore_index).sum().clamp(min=1)


def _finish(gradient: Tensor | None, x: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """The gradient, scaled where it lies, in the dtype of its input."""
    if gradient is None or x is None:
        return None
    return (gradient if scale is None else gradient.mul_(scale)).to(x.dtype)


def _check_arguments(
    latents: Tensor | SubspaceLatents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    targets: Tensor,
    decoder_bias: Tensor | None,
    options: LossOptions,
) -> None:
    if prior_logits.dim() != 2:
        raise ValueError(f"prior_logits: expected (N, K), given {tuple(prior_logits.shape)}")
    check_shapes(latents, prior_logits, decoder_weight, decoder_bias)
    if targets.shape != prior_logits.shape[:1]:
        raise ValueError(f"targets: expected ({prior_logits.shape[0]},), given {tuple(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"targets: expected integer class indices, given {targets.dtype}")
    if options.reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, given {options.reduction!r}")
    chunk_size = options.chunk_size
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected an int of at least 1, or None, given {chunk_size!r}")
    dtype = latents[0].dtype
    if dtype != decoder_weight.dtype and not torch.is_autocast_enabled(targets.device.type):
        raise ValueError(f"latents: expected the decoder's {decoder_weight.dtype}, given {dtype}")
    if targets.device.type == "cpu":
        num_classes = decoder_weight.shape[0]
        outside = (targets != options.ignore_index) & ((targets < 0) | (targets >= num_classes))
        if outside.any():
            raise ValueError(
                f"targets: expected class indices below {num_classes}, or {options.ignore_index}, "
                f"given {int(targets[outside][0])}"
            )
