"""The loss of the mixture of softmaxes at the cost of its matrix products.

The gradients are computed in the forward pass, chunk by chunk, and handed over in the backward pass. A training step
is three products of (N K) x E x V, two when the decoder is frozen, one without gradients.
"""

from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mos_chunks import LossOptions, loss_and_gradients
from .mos_latents import SubspaceLatents
from .mos_log_probs import check_shapes
from .mos_vocabulary import VocabularyShard

REDUCTIONS = ("mean", "sum", "none")


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
    shard: VocabularyShard | None = None,
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
        shard: the classes whose rows `decoder_weight` and `decoder_bias` hold, where several processes share the
            vocabulary. Each gets the whole loss and the whole gradient of the latents and the prior logits. `None`:
            they are all here.

    Returns:
        The negative log-likelihood in nats, in fp32 (fp64 for fp64): a scalar, or (N,) for `"none"`, zero where
        ignored. If every target is ignored, zero with zero gradients. Differentiable once.

    Raises:
        ValueError: shapes or dtypes do not fit together, a target is out of range (on the CPU; other devices assert),
            or an option is unknown.

    Source: Yang et al. 2018, arXiv 1711.03953, section 2.3; gradients in the forward pass as in Liger's fused linear
    cross-entropy, arXiv 2410.10989.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, given {reduction!r}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected an int of at least 1, or None, given {chunk_size!r}")
    num_classes = decoder_weight.shape[0] if shard is None else shard.num_classes
    _check_tensors(latents, prior_logits, decoder_weight, targets, decoder_bias, ignore_index, num_classes)
    latent_tensors = latents if isinstance(latents, SubspaceLatents) else (latents,)
    work_dtype = _work_dtype(latent_tensors[0])
    options = LossOptions(softcap, ignore_index, chunk_size, work_dtype, shard)
    tensors = (prior_logits, decoder_weight, decoder_bias, targets, *latent_tensors)
    if torch.compiler.is_compiling() and shard is None:
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in _inputs(tensors)]
        loss, _ = cross_entropy_operator(*tensors[:4], list(latent_tensors), None, *options[:4], reduction, wanted)
        return loss
    if not torch.is_grad_enabled():  # autograd would still say that gradients are needed
        tensors = tuple(None if x is None else x.detach() for x in tensors)
    return MoSCrossEntropy.apply(options, reduction, *tensors)


class MoSCrossEntropy(torch.autograd.Function):
    """`mos_cross_entropy` without its checks."""

    @staticmethod
    def forward(ctx: Any, options: LossOptions, reduction: str, *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.options, ctx.reduction = options, reduction
        if reduction == "none":  # the gradients wait for each token's weight
            ctx.gradients = None
            return loss_and_gradients(tensors, options)[0]
        nll, ctx.gradients = loss_and_gradients(tensors, options, _wanted(ctx))
        return nll.sum() / _denominator(tensors, options, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors, options, reduction = ctx.saved_tensors, ctx.options, ctx.reduction
        if reduction == "none":
            _, gradients = loss_and_gradients(tensors, options, _wanted(ctx), token_weights=grad_output)
        else:
            gradients, ctx.gradients = ctx.gradients, None  # handed over, so that they can be scaled where they lie
            if gradients is None:  # a second backward pass through a retained graph
                _, gradients = loss_and_gradients(tensors, options, _wanted(ctx))
            scale = grad_output / _denominator(tensors, options, reduction)
            gradients = tuple(None if gradient is None else gradient.mul_(scale) for gradient in gradients)
        prior, weight, bias, *latents = (
            None if gradient is None else gradient.to(x.dtype)
            for gradient, x in zip(gradients, _inputs(tensors), strict=True)
        )
        return (None, None, prior, weight, bias, None, *latents)


def _free_name() -> str:
    """A process may load the package and its copies as remote code; defining an operator again destroys the first."""
    names = (f"cross_entropy_{number}" if number else "cross_entropy" for number in count())
    return next(f"hf_mos::{name}" for name in names if not hasattr(torch.ops.hf_mos, name))


@torch.library.custom_op(_free_name(), mutates_args=())
def cross_entropy_operator(
    prior_logits: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor | None,
    targets: Tensor,
    latents: list[Tensor],
    token_weights: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    chunk_size: int | None,
    work_dtype: torch.dtype,
    reduction: str,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The loss as one operator, which torch.compile does not look into, and its gradients, empty where not wanted."""
    options = LossOptions(softcap, ignore_index, chunk_size, work_dtype)
    tensors = (prior_logits, decoder_weight, decoder_bias, targets, *latents)
    waits = reduction == "none" and token_weights is None
    nll, gradients = loss_and_gradients(tensors, options, (False,) * 6 if waits else tuple(wanted), token_weights)
    loss = nll if reduction == "none" else nll.sum() / _denominator(tensors, options, reduction)
    return loss, [prior_logits.new_empty(0) if gradient is None else gradient for gradient in gradients]


@cross_entropy_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *tensors, latents, token_weights, _, _, _, work_dtype, reduction, wanted = arguments
    targets, inputs = tensors[3], (*tensors[:3], *latents)
    sum_dtype = torch.promote_types(latents[0].dtype, torch.float32)
    loss = targets.new_empty(targets.shape if reduction == "none" else (), dtype=sum_dtype)
    waits = reduction == "none" and token_weights is None
    dtypes = (sum_dtype, sum_dtype, sum_dtype, work_dtype, work_dtype, sum_dtype)
    return loss, [
        torch.empty_like(x, dtype=dtype) if want and not waits else loss.new_empty(0)
        for x, want, dtype in zip(inputs, wanted, dtypes, strict=False)
    ]


def _save_for_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    *tensors, latents, _, softcap, ignore_index, chunk_size, work_dtype, reduction, wanted = inputs
    ctx.options, ctx.reduction, ctx.wanted = (softcap, ignore_index, chunk_size, work_dtype), reduction, wanted
    ctx.save_for_backward(*tensors, *latents, *output[1])


def _backward_of_operator(ctx: Any, grad_output: Tensor, _: list[Tensor]) -> tuple[Any, ...]:
    tensors, gradients = ctx.saved_tensors[: -len(ctx.wanted)], ctx.saved_tensors[-len(ctx.wanted) :]
    if ctx.reduction == "none":
        weighing = (list(tensors[4:]), grad_output, *ctx.options, ctx.reduction, ctx.wanted)
        _, gradients = cross_entropy_operator(*tensors[:4], *weighing)
    else:
        scale = grad_output / _denominator(tensors, LossOptions(*ctx.options), ctx.reduction)
        gradients = [gradient * scale for gradient in gradients]
    prior, weight, bias, *latents = (
        gradient.to(x.dtype) if want else None
        for gradient, x, want in zip(gradients, _inputs(tensors), ctx.wanted, strict=True)
    )
    return (prior, weight, bias, None, latents, *(None,) * 7)


cross_entropy_operator.register_autograd(_backward_of_operator, setup_context=_save_for_operator)


def _inputs(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Prior logits, decoder weight, decoder bias and the latent tensors: all but the targets."""
    return (*tensors[:3], *tensors[4:])


def _wanted(ctx: Any) -> tuple[bool, ...]:
    return _inputs(ctx.needs_input_grad[2:])


def _denominator(tensors: tuple[Any, ...], options: LossOptions, reduction: str) -> Tensor | int:
    return 1 if reduction == "sum" else (tensors[3] != options.ignore_index).sum().clamp(min=1)


def _work_dtype(latents: Tensor) -> torch.dtype:
    device_type = latents.device.type
    if torch.is_autocast_enabled(device_type) and latents.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return latents.dtype


def _check_tensors(
    latents: Tensor | SubspaceLatents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    targets: Tensor,
    decoder_bias: Tensor | None,
    ignore_index: int,
    num_classes: int,
) -> None:
    if prior_logits.dim() != 2:
        raise ValueError(f"prior_logits: expected (N, K), given {tuple(prior_logits.shape)}")
    check_shapes(latents, prior_logits, decoder_weight, decoder_bias)
    if targets.shape != prior_logits.shape[:1]:
        raise ValueError(f"targets: expected ({prior_logits.shape[0]},), given {tuple(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets: expected integer class indices, given {targets.dtype}")
    dtype = (latents if isinstance(latents, Tensor) else latents.hidden_states).dtype
    if dtype != decoder_weight.dtype and not torch.is_autocast_enabled(targets.device.type):
        raise ValueError(f"latents: expected the decoder's {decoder_weight.dtype}, given {dtype}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (targets != ignore_index) & ((targets < 0) | (targets >= num_classes))
        if outside.any():
            raise ValueError(
                f"targets: expected class indices below {num_classes}, or {ignore_index}, "
                f"given {int(targets[outside][0])}"
            )
