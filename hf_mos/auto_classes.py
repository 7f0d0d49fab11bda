"""Registers mixtures with the Auto classes of transformers, where this package is imported."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .remote_code.configuration_mos import LISTENERS, MODEL_TYPE, MoSConfig
from .remote_code.modeling_mos import MoSForCausalLM

# These load other models that have the layers of a causal LM; of a mixture too.
WITH_THE_SAME_LAYERS: tuple[Any, ...] = (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)


def register(config_class: type[MoSConfig]) -> None:
    """Lets the Auto classes load mixtures with this config class, and models that have their layers."""
    AutoModelForCausalLM.register(config_class, MoSForCausalLM, exist_ok=True)
    for auto in WITH_THE_SAME_LAYERS:
        if (other := auto._model_mapping.get(config_class.backbone_config_class, None)) is not None:
            auto._model_mapping.register(config_class, other, exist_ok=True)


AutoConfig.register(MODEL_TYPE, MoSConfig)
AutoModelForCausalLM.register(MoSConfig, MoSForCausalLM)
MoSConfig.register_for_auto_class()
MoSForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LISTENERS.append(register)
