"""Registers mixtures with the Auto classes of transformers: the config at once, models when one is asked for."""

from transformers.models.auto.configuration_auto import AutoConfig

from .remote_code.configuration_mos import LISTENERS, MODEL_TYPE, MoSConfig

# These classes load the layers of a causal LM, with another head or none. They load those of a mixture too.
WITH_THE_SAME_LAYERS = (
    "AutoModel",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)

# These load models that also read images or sound, whose head may be a mixture.
OF_MANY_INPUTS = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def register(config_class: type[MoSConfig]) -> None:
    """Lets the Auto classes load mixtures with this config class, and models that have their layers."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import modeling_auto

    from .remote_code.modeling_mos import MoSForCausalLM

    MoSForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    AutoModelForCausalLM.register(config_class, MoSForCausalLM, exist_ok=True)
    for name in (*WITH_THE_SAME_LAYERS, *OF_MANY_INPUTS):
        mapping = getattr(modeling_auto, name)._model_mapping
        if (other := mapping.get(config_class.backbone_config_class, None)) is not None:
            mapping.register(config_class, MoSForCausalLM if name in OF_MANY_INPUTS else other, exist_ok=True)


AutoConfig.register(MODEL_TYPE, MoSConfig)
MoSConfig.register_for_auto_class()
LISTENERS.append(register)
