"""Folds the gain of the final norm into the head: the first step of tools that rotate a model and quantise it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..remote_code.mos_head import MoSLMHead
from ..remote_code.mos_matmul import is_bare


@torch.no_grad()
def fold_final_norm(model: Any) -> nn.Module:
    """Makes the gain of the final norm one, in place, without a change of the predictions, and returns that norm.

    Equivalent to: `norm.weight.fill_(1)` and, of a softmax model, `lm_head.weight.mul_(gain)`. In a mixture the prior
    and the shift read the hidden state too. A bias of the norm is divided by the gain.

    Raises:
        ValueError: the decoder is the embedding too, a layer of the head is no plain one, the gain has a zero, or the
            head reads no norm with a gain. The model is then as before.
    """
    head: Any = model.get_output_embeddings()
    layers = [getattr(head, name, None) for name in ("prior", "shift", "widening")]
    if type(head) is not MoSLMHead or not all(layer is None or is_bare(layer) for layer in layers):
        raise ValueError(f"model: expected a mixture whose head has plain layers, given {head}")
    if head.weight is model.get_input_embeddings().weight:
        raise ValueError("tie_word_embeddings: expected False, as the embedding has no such gain, given True")
    tokens = torch.arange(8, device=head.weight.device).remainder(head.out_features).unsqueeze(0)
    norm = last_norm(model, tokens, head.in_features)
    weight, bias, before = norm.weight.clone(), getattr(norm, "bias", None), model.head_inputs(tokens).float()
    bias_before = None if bias is None else bias.clone()
    for unit in (0.0, 1.0):  # the gain is one plus the weight, as in Gemma, or the weight
        gain = weight.float() + 1 - unit
        if not gain.all():
            continue
        norm.weight.fill_(unit)
        if bias is not None:
            bias.div_(gain)
        gap = (gain * model.head_inputs(tokens) - before).abs().amax()
        if gap <= 16 * torch.finfo(weight.dtype).eps * before.abs().amax():
            change_basis(head, gain)
            return norm
        norm.weight.copy_(weight)
        if bias is not None:
            bias.copy_(bias_before)
    raise ValueError("model: expected a final norm with a gain without zeros, which the head reads, given another")


def change_basis(head: MoSLMHead, gain: Tensor) -> None:
    """Lets the head read `h / gain` in place of h. Its decoder then reads `latents / gain`: shifts are divided too."""
    for layer in (head, head.prior, head.shift):
        layer.weight.copy_(layer.weight.float() * gain.to(layer.weight.device))
    last = (head.shift if head.widening is None else head.widening).weight  # what makes the shift's D numbers
    last.copy_((last.float().unflatten(0, (-1, len(gain))) / gain.to(last.device).unsqueeze(-1)).flatten(0, 1))


def last_norm(model: Any, tokens: Tensor, width: int) -> Any:
    """The last module with a weight of (D,) that a forward pass calls. ValueError where there is none."""
    called: list[nn.Module] = []
    modules = [
        module for module in model.modules() if getattr(getattr(module, "weight", None), "shape", None) == (width,)
    ]
    hooks = [module.register_forward_hook(lambda module, *_: called.append(module)) for module in modules]
    model.head_inputs(tokens)
    for hook in hooks:
        hook.remove()
    if not called:
        raise ValueError(f"model: expected a norm with a gain of {width} numbers, given none")
    return called[-1]
