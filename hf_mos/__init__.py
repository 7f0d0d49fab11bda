"""A mixture of softmaxes for any causal language model of Hugging Face transformers."""

from typing import Any

from . import auto_classes, conversion  # noqa: F401  # register mixtures; give MoSForCausalLM its from_causal_lm
from .mixture_of_softmaxes import MixtureOfSoftmaxes
from .remote_code import modeling_mos
from .remote_code.configuration_mos import MoSConfig
from .remote_code.modeling_mos import MoSForCausalLM
from .remote_code.mos_head import MoSLMHead
from .remote_code.mos_log_probs import mos_log_probs
from .remote_code.mos_loss import mos_cross_entropy
from .training import compiled_loss, tensor_parallel, token_scores  # noqa: F401  # these add to what travels

__version__ = "0.1.0"
__all__ = [
    "MixtureOfSoftmaxes",
    "MoSConfig",
    "MoSForCausalLM",
    "MoSLMHead",
    "mos_cross_entropy",
    "mos_log_probs",
]


def __getattr__(name: str) -> Any:
    """The class of the mixtures with a softmax model, made when it is first asked for: `MoSLlamaForCausalLM`."""
    if name.startswith("MoS"):
        return getattr(modeling_mos, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
