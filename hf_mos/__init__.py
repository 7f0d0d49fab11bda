"""A mixture of softmaxes for any causal language model of Hugging Face transformers."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_mos import MoSConfig
from .mixture_of_softmaxes import MixtureOfSoftmaxes
from .modeling_mos import MoSForCausalLM
from .mos_head import MoSLMHead
from .mos_log_probs import mos_log_probs
from .mos_loss import mos_cross_entropy

__version__ = "0.1.0"
__all__ = [
    "MixtureOfSoftmaxes",
    "MoSConfig",
    "MoSForCausalLM",
    "MoSLMHead",
    "mos_cross_entropy",
    "mos_log_probs",
]

AutoConfig.register("mos", MoSConfig)
AutoModelForCausalLM.register(MoSConfig, MoSForCausalLM)
MoSConfig.register_for_auto_class()
MoSForCausalLM.register_for_auto_class("AutoModelForCausalLM")
