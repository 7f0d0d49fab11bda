"""The conversion of a causal LM: `MoSForCausalLM.from_causal_lm`, and what it refuses.

It does not travel with a checkpoint, whose code only has to run a converted model.
"""

import copy
import dataclasses
import inspect
import os
import re
from typing import Any, NoReturn

import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_mos import SOFTCAP_FIELDS, MoSConfig, take_softcap
from .modeling_mos import MoSForCausalLM
from .mos_latents import kind_of

logger = logging.get_logger(__name__)


def convert_causal_lm(
    cls: type[MoSForCausalLM], model: str | PreTrainedModel, num_mixtures: int, kwargs: dict[str, Any]
) -> MoSForCausalLM:
    """`cls.from_causal_lm(model, num_mixtures=num_mixtures, **kwargs)`, documented there."""
    config_class: type[MoSConfig] = cls.config_class  # the code beside a checkpoint has a class of its own
    fields = {field.name for field in dataclasses.fields(config_class)} & config_class.__annotations__.keys()
    options = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
    known_options = f"options of MoSConfig ({', '.join(sorted(fields))})"
    if "text_config" in options:
        raise ValueError("text_config: expected none, it is the model's own config")
    if isinstance(model, PreTrainedModel):
        if kwargs:
            raise ValueError(f"expected {known_options}, given {sorted(kwargs)}")
        refuse_mixture(model.config, type(model).__name__)
        backbone = share_weights(model)
    elif isinstance(model, (str, os.PathLike)):
        wide = {"model_type": "llama", "hidden_size": 2**20}  # of no width that could refuse a rank
        config_class(text_config=wide, num_mixtures=num_mixtures, **options)  # fail before loading
        try:
            backbone = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        except TypeError as error:  # from_pretrained hands unknown arguments to the model's constructor
            raise ValueError(f"expected {known_options} or of from_pretrained: {error}") from error
        except ValueError as error:
            if other := re.match(r"Unrecognized configuration class <class '.*?(\w+)'>", str(error)):
                raise ValueError(not_causal(other[1], repr(str(model)))) from error  # without a list of all classes
            raise
        refuse_mixture(backbone.config, repr(str(model)))
    else:
        raise ValueError(f"model: expected a path, a Hub id or a causal LM, given {type(model).__name__}")
    projection = output_projection(backbone)
    config = _config_for(config_class, backbone, projection, num_mixtures, options)
    module: Any
    for module in backbone.modules():
        module._is_hf_initialized = True  # post_init must not draw its weights again
    result = cls(config, backbone=backbone)
    result.generation_config = backbone.generation_config
    config.name_or_path = backbone.name_or_path  # for cards and tokenizers
    result.name_or_path = ""  # PEFT would name it as the base of an adapter; the softmax model is not that base
    return result.train(backbone.training)


def refuse_mixture(config: PreTrainedConfig, given: str) -> None:
    """Raises a ValueError for the config of a mixture, also of the class in the code beside a checkpoint."""
    if config.model_type == MoSConfig.model_type:
        raise ValueError(f"model: expected a causal LM with a softmax head, given {given}, a mixture already")


def refuse_other_models(config: PreTrainedConfig, given: str) -> None:
    """Raises a ValueError for the config of a model that `AutoModelForCausalLM` does not load."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(not_causal(type(config).__name__, given))


def not_causal(config_class: str, given: str) -> str:
    return f"model: expected a causal LM, given {given}, a {config_class}, which is not one"


def _config_for(
    config_class: type[MoSConfig],
    backbone: PreTrainedModel,
    projection: nn.Linear,
    num_mixtures: int,
    options: dict[str, Any],
) -> MoSConfig:
    """Makes the config of the conversion; raises a ValueError where an option would change the model's predictions."""
    tied = projection.weight is backbone.get_input_embeddings().weight
    softcap = take_softcap(backbone.config)
    softcap = softcap if reads_softcap(backbone) else None
    own = {"tie_word_embeddings": tied, "softcap": softcap, "decoder_bias": projection.bias is not None}
    for name in ("softcap", "decoder_bias"):
        if options.get(name) not in (None, own[name]):
            raise ValueError(f"{name}: expected {own[name]!r}, as the model has it, given {options[name]!r}")
    if options.get("tie_word_embeddings") and not tied:
        raise ValueError("tie_word_embeddings: expected False, the model's own head is not tied, given True")
    given = {name: value for name, value in options.items() if value is not None}
    config = config_class(text_config=backbone.config, num_mixtures=num_mixtures, **{**own, **given})
    if config.latent_size not in (None, projection.in_features):
        raise ValueError(
            f"latent_size: expected {projection.in_features}, the head's width, given {config.latent_size}"
        )
    if not kind_of(config).is_exact(config):
        logger.warning(
            f"latent_activation={config.latent_activation!r} changes the model's predictions until it is trained; "
            "only 'identity' is exact at step 0."
        )
    config.dtype = backbone.dtype
    return config


def output_projection(model: PreTrainedModel) -> nn.Linear:
    """Returns the model's vocabulary projection; raises a ValueError where none can be taken off."""

    def refuse(expected: str, given: str) -> NoReturn:
        raise ValueError(f"model: expected a causal LM {expected}, given {type(model).__name__} {given}")

    if model.config.is_encoder_decoder:
        refuse("without an encoder", "that has one")
    if "labels" not in inspect.signature(model.forward).parameters:
        refuse("whose forward takes labels", "that is no language model by itself")
    projection = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear):
        found = "none" if projection is None else type(projection).__name__
        refuse("whose output embeddings are one nn.Linear", f"with {found}")
    mapping: Any = AutoModelForCausalLM._model_mapping
    mapped = type(model.config) in mapping
    loaded = mapping[type(model.config)] if mapped else getattr(transformers, type(model).__name__, None)
    if loaded is None or not isinstance(model, loaded):
        name = "no class of transformers" if loaded is None else loaded.__name__
        refuse("of the class that its config is loaded as", f"for which that is {name}")
    return projection


def reads_softcap(backbone: PreTrainedModel) -> bool:
    """Whether the model applies its config's softcap; some vision-language models ignore their text model's."""
    forwards = [vars(base)["forward"] for base in type(backbone).__mro__ if "forward" in vars(base)]
    names = {name for forward in forwards for name in inspect.unwrap(forward).__code__.co_names}
    return not names.isdisjoint({*SOFTCAP_FIELDS, "logit_softcap"})


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the model's modules and configs around the same tensors."""
    modules = [*model.modules()]
    kept = (value for module in modules for value in vars(module).values() if isinstance(value, Tensor))
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *kept)}
    return copy.deepcopy(model, memo)
