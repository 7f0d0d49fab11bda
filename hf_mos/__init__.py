"""A mixture of softmaxes for any causal language model of Hugging Face transformers."""

import importlib
from typing import TYPE_CHECKING, Any

from .after_import import install

if TYPE_CHECKING:
    from .mixture_of_softmaxes import MixtureOfSoftmaxes
    from .remote_code.configuration_mos import MoSConfig
    from .remote_code.modeling_mos import MoSForCausalLM
    from .remote_code.mos_head import MoSLMHead
    from .remote_code.mos_log_probs import mos_log_probs
    from .remote_code.mos_loss import mos_cross_entropy

__version__ = "0.1.0"
__all__ = [
    "MixtureOfSoftmaxes",
    "MoSConfig",
    "MoSForCausalLM",
    "MoSLMHead",
    "mos_cross_entropy",
    "mos_log_probs",
]

# The modules of the public names, imported when a name is first asked for: torch and transformers take seconds.
MODULES = {
    "MixtureOfSoftmaxes": "mixture_of_softmaxes",
    "MoSConfig": "remote_code.configuration_mos",
    "MoSForCausalLM": "remote_code.modeling_mos",
    "MoSLMHead": "remote_code.mos_head",
    "mos_cross_entropy": "remote_code.mos_loss",
    "mos_log_probs": "remote_code.mos_log_probs",
}

install()


def __getattr__(name: str) -> Any:
    """A public name, or the class of the mixtures with a softmax model, made at this moment: `MoSLlamaForCausalLM`."""
    if name in MODULES or name.startswith("MoS"):
        module = importlib.import_module(f"{__name__}.{MODULES.get(name, 'remote_code.modeling_mos')}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
