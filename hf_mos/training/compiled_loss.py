"""The loss as an operator that torch.compile does not open, so that a training step is one graph.

This module does not travel with a checkpoint: without it torch.compile breaks the graph at the loss.
"""

from typing import Any

import torch
from torch import Tensor

from ..remote_code import mos_loss
from ..remote_code.mos_log_probs import divisor, reduce
from ..remote_code.mos_loss import LossInputs, LossOptions, differentiable_once, gradients_for, loss_of


def apply_when_compiling(options: LossOptions, reduction: str, targets: Tensor, *inputs: Tensor | None) -> Tensor:
    """Equivalent to: `MoSCrossEntropy.apply`."""
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    return cross_entropy_operator(*inputs, targets, None, *options[:-1], reduction, wanted)[0]


@torch.library.custom_op("hf_mos::cross_entropy", mutates_args=())
def cross_entropy_operator(
    latents: Tensor,
    offsets: Tensor | None,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor | None,
    widening: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    softcap: float | None,
    shortlist_size: int | None,
    ignore_index: int,
    work_dtype: torch.dtype,
    reduction: str,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Opaque to torch.compile; returns the loss and one gradient per input, empty where not wanted."""
    options = LossOptions(softcap, shortlist_size, ignore_index, work_dtype)
    inputs = LossInputs(latents, offsets, prior_logits, decoder_weight, decoder_bias, widening)
    waits = options.waits(reduction) and token_weights is None
    wants = LossInputs(*(each and not waits for each in wanted))
    with torch.autocast(targets.device.type, enabled=False):
        nll, gradients = loss_of(options)(inputs, targets, options, wants, token_weights)
    loss = reduce(nll, targets != ignore_index, reduction)
    return loss, [latents.new_empty(0) if gradient is None else gradient for gradient in gradients]


@cross_entropy_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    inputs, (targets, token_weights, *given, reduction, wanted) = arguments[:6], arguments[6:]
    options = LossOptions(*given)
    sum_dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    loss = targets.new_empty(targets.shape if reduction == "none" else (), dtype=sum_dtype)
    waits = options.waits(reduction) and token_weights is None
    dtypes = (options.work_dtype, options.work_dtype, *(sum_dtype,) * 4)
    return loss, [
        torch.empty_like(x, dtype=dtype) if want and not waits else inputs[0].new_empty(0)
        for x, want, dtype in zip(inputs, wanted, dtypes, strict=True)
    ]


def _save_for_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    *ctx.options, ctx.reduction, ctx.wanted = inputs[8:]
    ctx.save_for_backward(*inputs[:7], *output[1])


@differentiable_once
def _backward_of_operator(ctx: Any, grad_output: Tensor, _: list[Tensor]) -> tuple[Any, ...]:
    *inputs, targets = ctx.saved_tensors[:7]
    gradients, options = ctx.saved_tensors[7:], LossOptions(*ctx.options)
    weights = grad_output / divisor(targets != options.ignore_index, ctx.reduction)
    if options.waits(ctx.reduction):
        weighing = (targets, weights.expand(targets.shape), *ctx.options, ctx.reduction, ctx.wanted)
        _, gradients = cross_entropy_operator(*inputs, *weighing)
    else:
        gradients = [gradient * weights for gradient in gradients]
    wanted = [gradient if want else None for gradient, want in zip(gradients, ctx.wanted, strict=True)]
    return (*gradients_for(LossInputs(*inputs), wanted), *(None,) * 8)


cross_entropy_operator.register_autograd(_backward_of_operator, setup_context=_save_for_operator)
mos_loss.apply_when_compiling = apply_when_compiling
