"""The loss of the mixture of softmaxes at the cost of its matrix products.

    N tokens, K mixtures, E latent_size, V classes
    component_nll    = logsumexp_V(component_logits) - component_logits[target]        (N, K)
    nll              = -logsumexp_K(log_prior - component_nll)                         (N,)
    responsibilities = softmax_K(log_prior - component_nll)                            (N, K)
    d component_logits = responsibilities_k * (softmax(component_logits_k) - onehot)   never stored
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

from .mixture_of_softmaxes import check_shapes, widen

REDUCTIONS = ("mean", "sum", "none")

# Working memory of the loss. On the CPU chunks beyond this bring nothing more; on an accelerator larger products
# keep more of it busy, so the budget follows its memory.
CPU_BUDGET_BYTES = 64 * 2**20
MIN_BUDGET_BYTES = 256 * 2**20
DEVICE_MEMORY_SHARE = 1 / 64


def mos_cross_entropy(
    latents: Tensor,
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
        latents: (N, K, E), one latent for each token and component.
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
    _check_arguments(latents, prior_logits, decoder_weight, targets, decoder_bias, ignore_index, reduction, chunk_size)
    options = LossOptions(softcap, ignore_index, reduction, chunk_size)
    return MoSCrossEntropy.apply(latents, prior_logits, decoder_weight, decoder_bias, targets, options)


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
        latents: Tensor,
        prior_logits: Tensor,
        decoder_weight: Tensor,
        decoder_bias: Tensor | None,
        targets: Tensor,
        options: LossOptions,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:4]
        inputs = (latents, prior_logits, decoder_weight, decoder_bias, targets)
        ctx.save_for_backward(*inputs)
        ctx.options = options
        ctx.work_dtype = _work_dtype(latents)

        if options.reduction == "none":  # the gradients wait for each token's weight
            ctx.gradients = None
            return _loss_and_gradients(*inputs, options, ctx.work_dtype)[0]
        nll, ctx.gradients = _loss_and_gradients(*inputs, options, ctx.work_dtype, wanted)
        return nll.sum() * _scale(targets, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, options = ctx.saved_tensors, ctx.options
        wanted = ctx.needs_input_grad[:4]
        if options.reduction == "none":
            _, gradients = _loss_and_gradients(*inputs, options, ctx.work_dtype, wanted, token_weights=grad_output)
            return _finish(gradients, inputs, None)
        gradients, ctx.gradients = ctx.gradients, None  # handed over, so that they can be scaled where they lie
        if gradients is None:  # a second backward pass through a retained graph
            _, gradients = _loss_and_gradients(*inputs, options, ctx.work_dtype, wanted)
        return _finish(gradients, inputs, grad_output * _scale(inputs[4], options))


class Gradients(NamedTuple):
    latents: Tensor | None
    prior_logits: Tensor | None
    decoder_weight: Tensor | None
    decoder_bias: Tensor | None


@torch.no_grad()
def _loss_and_gradients(
    latents: Tensor,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    work_dtype: torch.dtype,
    wanted: tuple[bool, ...] = (False,) * 4,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """Each token's nll (N,), and the gradients of their sum, weighted by `token_weights` (N,) if there are any.

    Gradients that many tokens add to are summed in fp32 or wider, whatever the dtype of the products.
    """
    with torch.autocast(latents.device.type, enabled=False):
        N, K, E = latents.shape
        V = decoder_weight.shape[0]
        device, sum_dtype = latents.device, widen(latents[:0]).dtype
        weight = decoder_weight.to(work_dtype)
        log_prior = F.log_softmax(prior_logits.to(sum_dtype), dim=-1)

        nll = torch.zeros(N, dtype=sum_dtype, device=device)
        d_latents = torch.zeros(N, K, E, dtype=work_dtype, device=device) if wanted[0] else None
        d_prior = torch.zeros(N, K, dtype=sum_dtype, device=device) if wanted[1] else None
        d_weight = torch.zeros(V, E, dtype=sum_dtype, device=device) if wanted[2] else None
        d_bias = torch.zeros(V, dtype=sum_dtype, device=device) if wanted[3] else None
        needs_logits_gradient = wanted[0] or wanted[2] or wanted[3]

        buffers = ChunkBuffers(K, V, options, work_dtype, sum_dtype, device, needs_logits_gradient)
        for tokens in buffers.chunks(targets):
            chunk_targets = targets[tokens].unsqueeze(-1)  # (n, 1)
            n = chunk_targets.shape[0]
            latent_rows = latents[tokens].reshape(n * K, E).to(work_dtype)
            target_rows = chunk_targets.expand(n, K).reshape(n * K, 1)

            logits, slope = buffers.component_logits(latent_rows, weight, decoder_bias)  # (n K, V)
            target_logits = logits.gather(1, target_rows).squeeze(1)
            if needs_logits_gradient:
                log_normalizer = softmax_(logits)  # logits now holds softmax(component_logits)
            else:
                log_normalizer = torch.logsumexp(logits, dim=1)
            component_nll = (log_normalizer - target_logits).view(n, K)

            log_joint = log_prior[tokens] - component_nll
            nll[tokens] = chunk_nll = -torch.logsumexp(log_joint, dim=-1)
            responsibilities = torch.exp(log_joint + chunk_nll.unsqueeze(-1))  # (n, K)
            if token_weights is not None:
                token_weight = token_weights[tokens].to(sum_dtype).unsqueeze(-1)
            if d_prior is not None:
                d_prior_chunk = log_prior[tokens].exp() - responsibilities
                d_prior[tokens] = d_prior_chunk if token_weights is None else d_prior_chunk * token_weight
            if not needs_logits_gradient:
                continue

            # d component_logits without its responsibilities: those go on the narrow side of each product.
            error = logits.scatter_add_(1, target_rows, logits.new_full((), -1.0).expand_as(target_rows))
            if slope is not None:
                error.mul_(slope)
            error = buffers.to_work_dtype(error)
            row_weights = responsibilities if token_weights is None else responsibilities * token_weight
            row_weights = row_weights.reshape(n * K, 1)
            if d_latents is not None:
                d_rows = torch.mm(error, weight)
                d_latents[tokens] = (d_rows * row_weights).view(n, K, E).to(work_dtype)
            weighted_latents = (latent_rows * row_weights).to(work_dtype)
            if d_weight is not None:
                if d_weight.dtype == work_dtype:
                    d_weight.addmm_(error.t(), weighted_latents)
                else:
                    d_weight += torch.mm(error.t(), weighted_latents)
            if d_bias is not None:
                d_bias += torch.mv(error.t().to(sum_dtype), row_weights.squeeze(1))
        return nll, Gradients(d_latents, d_prior, d_weight, d_bias)


class ChunkBuffers:
    """The reused buffers of (chunk_size * K, V), and the chunks of tokens that fit in them."""

    def __init__(
        self,
        num_mixtures: int,
        num_classes: int,
        options: LossOptions,
        work_dtype: torch.dtype,
        sum_dtype: torch.dtype,
        device: torch.device,
        needs_logits_gradient: bool,
    ) -> None:
        self.options = options
        self.work_dtype, self.sum_dtype, self.device = work_dtype, sum_dtype, device
        self.width = num_classes
        self.num_mixtures = num_mixtures
        self.has_slope = options.softcap is not None and needs_logits_gradient
        is_half = work_dtype != sum_dtype
        bytes_per_logit = sum_dtype.itemsize * (1 + self.has_slope) + work_dtype.itemsize * is_half
        self.bytes_per_token = num_mixtures * num_classes * bytes_per_logit
        self.logits: Tensor | None = None
        self.half: Tensor | None = None
        self.slope: Tensor | None = None

    def chunks(self, targets: Tensor) -> Iterator[slice | Tensor]:
        """Slices of the tokens, or index tensors that leave out the ignored ones."""
        kept = (targets != self.options.ignore_index).nonzero().squeeze(1)
        count = kept.shape[0]
        if count == 0:
            return
        size = self.options.chunk_size or max(1, budget_bytes(self.device) // self.bytes_per_token)
        size = -(-count // -(-count // size))  # chunks of equal size, none of them a small rest
        self._allocate(size * self.num_mixtures)
        for start in range(0, count, size):
            stop = min(start + size, count)
            yield slice(start, stop) if count == targets.shape[0] else kept[start:stop]

    def _allocate(self, rows: int) -> None:
        shape = (rows, self.width)
        self.logits = torch.empty(shape, dtype=self.sum_dtype, device=self.device)
        if self.work_dtype != self.sum_dtype:
            self.half = torch.empty(shape, dtype=self.work_dtype, device=self.device)
        if self.has_slope:
            self.slope = torch.empty(shape, dtype=self.sum_dtype, device=self.device)

    def component_logits(self, latent_rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
        """The capped component logits (rows, V) in fp32 or wider, and the softcap's slope at each of them."""
        rows = latent_rows.shape[0]
        assert self.logits is not None
        logits = self.logits[:rows]
        if self.half is None:
            torch.mm(latent_rows, weight.t(), out=logits)
        else:
            logits.copy_(torch.mm(latent_rows, weight.t(), out=self.half[:rows]))
        if bias is not None:
            logits.add_(bias)
        if self.options.softcap is None:
            return logits, None
        logits.div_(self.options.softcap).tanh_()
        slope = None
        if self.slope is not None:
            slope = torch.mul(logits, logits, out=self.slope[:rows]).neg_().add_(1)
        return logits.mul_(self.options.softcap), slope

    def to_work_dtype(self, error: Tensor) -> Tensor:
        return error if self.half is None else self.half[: error.shape[0]].copy_(error)


def softmax_(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in place; returns the logarithm of each row's normalizer.

    The normalizer is read back from the largest probability, exp(max - log_normalizer), which cannot underflow. That
    is two passes over the buffer where logsumexp and softmax take five and a copy of it.
    """
    largest, where = logits.max(dim=-1, keepdim=True)
    torch.softmax(logits, dim=-1, out=logits)
    return (largest - logits.gather(-1, where).log()).squeeze(-1)


def budget_bytes(device: torch.device) -> int:
    """Working memory for one chunk, in bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return max(MIN_BUDGET_BYTES, int(total * DEVICE_MEMORY_SHARE))
    return CPU_BUDGET_BYTES


def tokens_per_chunk(latents: Tensor, num_classes: int, copies: int) -> int:
    """How many tokens' component logits, held `copies` times in fp32 or wider, fit in the budget."""
    bytes_per_logit = widen(latents[:0]).dtype.itemsize * copies
    return max(1, budget_bytes(latents.device) // (latents.shape[-2] * num_classes * bytes_per_logit))


def _work_dtype(latents: Tensor) -> torch.dtype:
    device_type = latents.device.type
    if torch.is_autocast_enabled(device_type) and latents.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return latents.dtype


def _scale(targets: Tensor, options: LossOptions) -> Tensor | float:
    if options.reduction == "sum":
        return 1.0
    return 1.0 / (targets != options.ignore_index).sum().clamp(min=1)


def _finish(gradients: Gradients, inputs: tuple[Tensor, ...], scale: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients, scaled where they lie, in the dtypes of their inputs."""
    for gradient in gradients:
        if gradient is not None and scale is not None:
            gradient.mul_(scale)
    cast = [None if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=False)]
    return (*cast, None, None)


def _check_arguments(
    latents: Tensor,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    targets: Tensor,
    decoder_bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    chunk_size: int | None,
) -> None:
    if latents.dim() != 3:
        raise ValueError(f"latents: expected (N, K, E), given {tuple(latents.shape)}")
    check_shapes(latents, prior_logits, decoder_weight, decoder_bias)
    if targets.shape != latents.shape[:1]:
        raise ValueError(f"targets: expected ({latents.shape[0]},), given {tuple(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"targets: expected integer class indices, given {targets.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, given {reduction!r}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected an int of at least 1, or None, given {chunk_size!r}")
    autocast = torch.is_autocast_enabled(latents.device.type)
    if not autocast and latents.dtype != decoder_weight.dtype:
        raise ValueError(f"latents: expected the decoder's {decoder_weight.dtype}, given {latents.dtype}")
    if targets.device.type == "cpu" and targets.numel():
        num_classes = decoder_weight.shape[0]
        outside = (targets != ignore_index) & ((targets < 0) | (targets >= num_classes))
        if outside.any():
            raise ValueError(
                f"targets: expected class indices below {num_classes}, or {ignore_index}, "
                f"given {int(targets[outside][0])}"
            )
