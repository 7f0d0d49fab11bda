"""What the mixture answers as its backbone would: attributes, methods, and the signature of `forward`.

The rule, for models as for configs (`MoSConfig`): a public name that the mixture does not define is the backbone's, to
read, to set and to call. So code that is written for the softmax model finds the same names and values.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def answered_by_backbone(name: str) -> Callable[..., Any]:
    """A method that calls the backbone's method of the same name."""

    def method(self: "AnswersAsBackbone", *args: Any, **kwargs: Any) -> Any:
        return getattr(self.backbone, name)(*args, **kwargs)

    return method


class AnswersAsBackbone(nn.Module):
    """A part of [`MoSForCausalLM`]: hands public names that the model does not define to its backbone."""

    backbone: PreTrainedModel
    _is_built: bool  # from the end of the constructor on

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not vars(self).get("_is_built"):
                raise
        return getattr(self.backbone, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = vars(self)
        asks = own.get("_is_built") and not name.startswith("_") and not hasattr(type(self), name)
        if asks and name not in own and name not in own["_modules"] and hasattr(self.backbone, name):
            setattr(self.backbone, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def base_model(self) -> nn.Module:
        """The model that returns the last hidden states, as the softmax model's `base_model`."""
        return self.backbone.base_model

    def get_decoder(self) -> nn.Module:
        return self.backbone.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def bind_forward(self) -> None:
        """Gives this instance a `forward` with the backbone's signature. The class cannot have it."""
        vars(self)["forward"] = MethodType(self._forward_function(), self)

    def _forward_function(self) -> Callable[..., Any]:
        backbone_class: Any = type(self.backbone)
        return with_parameters_of(backbone_class, type(self).forward)

    def _has_bound_forward(self) -> bool:
        return getattr(vars(self).get("forward"), "__func__", None) is self._forward_function()

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles, which must not hold this instance's method
        return {k: value for k, value in vars(self).items() if k != "forward" or not self._has_bound_forward()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "forward" not in vars(self):
            self.bind_forward()

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        if self._has_bound_forward():
            replica.bind_forward()
        return replica

    # Generation, as the backbone does it.
    _prepare_model_inputs = answered_by_backbone("_prepare_model_inputs")
    _prepare_cache_for_generation = answered_by_backbone("_prepare_cache_for_generation")
    _update_model_kwargs_for_generation = answered_by_backbone("_update_model_kwargs_for_generation")
    _prepare_position_ids_for_generation = answered_by_backbone("_prepare_position_ids_for_generation")
    _validate_model_kwargs = answered_by_backbone("_validate_model_kwargs")
    _is_stateful = property(operator.attrgetter("backbone._is_stateful"))
    _can_compile_fullgraph = property(operator.attrgetter("backbone._can_compile_fullgraph"))
    supports_gradient_checkpointing = property(operator.attrgetter("backbone.supports_gradient_checkpointing"))


@functools.cache
def with_parameters_of(backbone_class: type[nn.Module], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A method like `forward`, with the parameters of the backbone's in their order, and then its own.

    The Trainer keeps the columns of a dataset that the signature names, and callers pass arguments by position.
    """
    theirs, ours = inspect.signature(backbone_class.forward).parameters, inspect.signature(forward).parameters
    first, *named, rest = theirs.values()
    names = [parameter.name for parameter in named]
    added = [p.replace(kind=p.KEYWORD_ONLY) for p in ours.values() if p.name not in theirs and p.kind != p.VAR_KEYWORD]

    @functools.wraps(forward)
    def in_their_order(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(f"forward: expected at most {len(names)} positional arguments, given {len(args)}")
        return forward(self, **dict(zip(names, args, strict=False)), **kwargs)

    in_their_order.__signature__ = inspect.Signature([first, *named, *added, rest])  # type: ignore[attr-defined]
    del in_their_order.__wrapped__  # who unwraps a forward ends here
    return in_their_order
