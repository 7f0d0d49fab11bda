"""Warns where an adapter of PEFT cannot train the shift of a new mixture: nothing else would show it.

The weight of a new shift is so small that no prediction sees it. LoRA and its like add to a weight, and move it. OFT,
IA3 and others only multiply it, so the components would stay equal. This module does not travel with a checkpoint.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..remote_code.mos_head import MoSLMHead

logger = logging.get_logger(__name__)

# Smaller shifts are new ones. An adapter whose gradient is smaller, for a random gradient of one token's shift, cannot
# move them: 1e-18 to 1e-11 where it multiplies a new shift. PiSSA, which factors it, has 1e-8, and LoRA about 1.
NOTICEABLE = 1e-10


def set_attribute(head: Any, name: str, value: Any) -> None:
    """Like `nn.Module.__setattr__`, by which PEFT puts an adapter around the shift; checks its first step."""
    nn.Module.__setattr__(head, name, value)
    if name == "shift" and hasattr(value, "base_layer"):
        value.register_forward_hook(look)


def look(adapter: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Warns of an adapter that cannot move a new shift. ValueError where the adapter makes no finite one."""
    asks = adapter.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not asks or getattr(adapter, "disable_adapters", False):
        return
    for key in [key for key, hook in adapter._forward_hooks.items() if hook is look]:
        del adapter._forward_hooks[key]  # in the same dict, to which the handles of other hooks refer
    kind = type(adapter).__module__.split(".")[-2]
    largest = output.detach().abs().amax()
    advice = 'train it whole, by modules_to_save=["lm_head.shift"], or by LoRA, or name other target_modules'
    if not largest.isfinite() and inputs[0].isfinite().all():
        given = f"{largest.item()} by the adapter ({kind}), as of DoRA around a weight of zeros"
        raise ValueError(f"shift: expected finite numbers, given {given}: {advice}")
    trained = [weight for weight in adapter.parameters() if weight.requires_grad]
    if largest < NOTICEABLE and trained and reached(adapter, inputs[0], trained) < NOTICEABLE:
        logger.warning(
            f"shift: the adapter ({kind}) multiplies a weight that is next to zero in a new mixture, and cannot train "
            f"it, so the components stay one softmax: {advice}"
        )


def reached(adapter: nn.Module, hidden_states: Tensor, trained: list[nn.Parameter]) -> float:
    """The largest gradient of the trained weights for a random gradient of one token's shifts."""
    with torch.autocast(hidden_states.device.type, enabled=False):  # fp16 rounds small gradients to zero
        shifts = adapter(hidden_states.detach().flatten(0, -2)[:1])
    drawn = torch.randn(shifts.shape, generator=torch.Generator().manual_seed(0)).to(shifts)
    gradients = torch.autograd.grad(shifts, trained, drawn, allow_unused=True)
    return max((float(x.abs().amax()) for x in gradients if x is not None and x.numel()), default=0.0)


MoSLMHead.__setattr__ = set_attribute  # type: ignore[method-assign, assignment]
