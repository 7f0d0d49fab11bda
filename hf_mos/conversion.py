"""The conversion of a causal LM: `MoSForCausalLM.from_causal_lm`, and what it refuses.

It does not travel with a checkpoint, whose code only has to run a converted model.
"""

import copy
import dataclasses
import inspect
import os
import re
import warnings
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .configuration_mos import SOFTCAP_FIELDS, MoSConfig, default_scale, take_softcap
from .modeling_mos import MoSForCausalLM
from .mos_backbone import path_of
from .mos_latents import kind_of

logger = logging.get_logger(__name__)

# The head of a conversion that chooses none: the mixture that is least dear. With a large vocabulary it is one on a
# shortlist. On SmolLM2-135M this trains in 1.3 to 1.6 times the seconds of one softmax, where the mixture of 4 on all
# classes takes 3.5 to 3.8, and no mixture pays there (`examples/softmax_bottleneck/real_model.py`). Where one pays, on
# a small converged model, it gains 1.2 times as much as the mixture of 4 (`retrofit.py --shortlists`). With a small
# vocabulary the mixture of 4 takes less time.
CHEAPEST_MIXTURE = {"num_mixtures": 16, "shortlist_size": 64}
CHEAPEST_FROM = 4096  # classes; below, MoSConfig's own default
CHOICES_OF_A_HEAD = {"latent_rank", "shortlist_size", "latent_size", "latent_activation"}


def convert_causal_lm(
    cls: type[MoSForCausalLM], model: str | PreTrainedModel, num_mixtures: int | None, kwargs: dict[str, Any]
) -> MoSForCausalLM:
    """`cls.from_causal_lm(model, num_mixtures=num_mixtures, **kwargs)`, documented there."""
    config_class: type[MoSConfig] = cls.config_class  # the code beside a checkpoint has a class of its own
    fields = {field.name for field in dataclasses.fields(config_class)} & config_class.__annotations__.keys()
    options = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
    known_options = f"options of MoSConfig ({', '.join(sorted(fields))})"
    if "text_config" in options:
        raise ValueError("text_config: expected none, it is the model's own config")
    chooses = num_mixtures is not None or options.keys() & CHOICES_OF_A_HEAD
    if num_mixtures is not None:
        options["num_mixtures"] = num_mixtures
    if isinstance(model, PreTrainedModel):
        if kwargs:
            raise ValueError(f"expected {known_options}, given {sorted(kwargs)}")
        refuse_mixture(model.config, type(model).__name__)
        backbone = share_weights(model)
    elif isinstance(model, (str, os.PathLike)):
        wide = {"model_type": "llama", "hidden_size": 2**20}  # of no width that could refuse a rank
        config_class(text_config=wide, **options)  # fail before loading
        if kwargs.get("output_loading_info"):
            raise ValueError("output_loading_info: expected False, as a model alone is returned, given True")
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
        advice = " Merge it first: PeftModel.merge_and_unload()." if hasattr(model, "peft_config") else ""
        raise ValueError(f"model: expected a path, a Hub id or a causal LM, given {type(model).__name__}.{advice}")
    projection = output_projection(backbone)
    refuse_changed_weights(backbone)
    forget_quantizer(backbone)
    device_map = device_map_of(backbone, projection)
    if not chooses and projection.out_features >= CHEAPEST_FROM:
        options |= CHEAPEST_MIXTURE
    config = _config_for(config_class, backbone, projection, options)
    module: Any
    for module in backbone.modules():
        module._is_hf_initialized = True  # post_init must not draw its weights again
    result = cls(config, backbone=backbone)
    result.generation_config = backbone.generation_config
    config.name_or_path = backbone.name_or_path  # for cards and tokenizers
    result.name_or_path = ""  # PEFT would name it as the base of an adapter; the softmax model is not that base
    if device_map is not None:
        result.hf_device_map = device_map
    return result.train(backbone.training)


def device_map_of(backbone: PreTrainedModel, projection: nn.Module) -> dict[str, Any] | None:
    """The `hf_device_map` of the mixture; transformers saves offloaded weights of a model that has one."""
    given = vars(backbone).pop("hf_device_map", None)
    if given is None:
        is_offloaded = hasattr(backbone, "_hf_hook") and any(weight.is_meta for weight in backbone.parameters())
        return {"": "cpu"} if is_offloaded else None  # accelerate's cpu_offload makes no map
    path = path_of(projection, backbone)
    covering = max((key for key in given if f"{path}.".startswith(f"{key}." if key else "")), key=len)
    others = {f"backbone.{key}" if key else "": device for key, device in given.items() if key != path}
    return others | ({"lm_head": given[covering]} if covering else {})


def refuse_changed_weights(model: PreTrainedModel) -> None:
    """Raises a ValueError where the model's weights are not those that its config makes.

    Only these can be saved and loaded: no adapter, no quantised weight, no layer that was replaced by hand.
    """

    def refuse(expected: str, given: str, advice: str) -> NoReturn:
        raise ValueError(f"model: expected {expected}, given {given}. {advice}")

    adapted = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None or getattr(model, "_hf_peft_config_loaded", False):
        where = "an adapter" if adapted is None else f"an adapter on {adapted}"
        refuse("a model without an adapter", where, "Merge it first: PeftModel.merge_and_unload().")
    quantised = next((name for name, weight in model.named_parameters() if is_quantised(weight)), None)
    if quantised is not None:
        advice = (
            "Convert the model as it was before, or what its dequantize() returns; save the mixture, and load it with "
            "quantization_config."
        )
        refuse("weights that are not quantized", f"{quantised} that is", advice)
    with torch.device("meta"), init.no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the config's values: the model itself has given them
        fresh = type(model)(copy.deepcopy(model.config))
    expected, given = shapes_of(fresh), shapes_of(model)
    for name in [*expected, *given]:
        if expected.get(name) != given.get(name):
            found = f"{name} of shape {given[name]}" if name in given else f"no {name}"
            made = f"{name} of shape {expected[name]}" if name in expected else f"no {name}"
            refuse(f"{made}, as its config says", found, "Only weights that the config makes can be loaded again.")


def forget_quantizer(model: PreTrainedModel) -> None:
    """Removes what a GGUF file, or a quantizer whose weights were dequantised, left: the model could not be saved."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights, a tied one under each of its names, and of those that ZeRO-3 has parted whole."""
    weights: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    return {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}


def is_quantised(weight: nn.Parameter) -> bool:
    """Whether a weight holds a quantizer's codes; a sharded weight (a DTensor) does not."""
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    return not weight.is_floating_point() or not (plain or hasattr(weight, "device_mesh"))


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
    options: dict[str, Any],
) -> MoSConfig:
    """Makes the config of the conversion; raises a ValueError where an option would change the model's predictions."""
    tied = projection.weight is backbone.get_input_embeddings().weight
    if projection.weight.is_meta and not tied:  # offloading makes two parameters of a tied one
        tied = backbone.config.get_text_config().tie_word_embeddings
    softcap = take_softcap(backbone.config)
    softcap = softcap if reads_softcap(backbone) else None
    own = {"tie_word_embeddings": tied, "softcap": softcap, "decoder_bias": projection.bias is not None}
    for name in ("softcap", "decoder_bias"):
        if options.get(name) not in (None, own[name]):
            raise ValueError(f"{name}: expected {own[name]!r}, as the model has it, given {options[name]!r}")
    if options.get("tie_word_embeddings") and not tied:
        raise ValueError("tie_word_embeddings: expected False, the model's own head is not tied, given True")
    given = {name: value for name, value in options.items() if value is not None}
    config = config_class(text_config=backbone.config, **{**own, **given})
    if config.adds_shifts and "latent_scale" not in given:
        config.latent_scale = default_scale(projection.in_features)  # the config alone may not tell the head's width
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
