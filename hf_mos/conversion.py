"""The conversion of a causal LM and the way back: `MoSForCausalLM.from_causal_lm`, `to_softmax`, and what they refuse.

It does not travel with a checkpoint, whose code only has to run a converted model.
"""

import copy
import inspect
import os
import re
import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from .remote_code.configuration_mos import (
    MODEL_TYPE,
    MoSConfig,
    adopt,
    check_options,
    default_scale,
    find_softcap_field,
    option_defaults,
)
from .remote_code.modeling_mos import MoSForCausalLM, model_class_for
from .remote_code.mos_checkpoint import CONFIG_FILE, STAGING_PREFIX
from .remote_code.mos_head import change_class, is_own
from .remote_code.mos_matmul import is_plain

WRITES_LOGITS = ("chameleon",)  # model types whose forward sets the logits of some classes itself
OWN_LOSSES = {  # of a config: the value by which a model adds nothing to the loss that is made of all logits
    "z_loss_coefficient": 0,  # Bamba
    "disable_ngram_loss": True,  # ProphetNet
}


def from_causal_lm(cls: Any, model: str | os.PathLike | PreTrainedModel, **kwargs: Any) -> MoSForCausalLM:
    """Replaces the head of a causal LM with a mixture. Predictions do not change until it is trained.

    The weights are not copied: a model that is passed in shares its weights with the result, so that training one
    trains the other. The model keeps its own head and can still be used.

    Args:
        model (`str` or `PreTrainedModel`):
            A path or Hub id, as for `AutoModelForCausalLM.from_pretrained`, or a causal LM.
        kwargs:
            The options of [`MoSConfig`] and `tie_word_embeddings`; with a path or id also the arguments of
            `from_pretrained`.

    Raises:
        ValueError: the model has no vocabulary projection that can be taken over, an option is unknown or out of
            range, or it would change the model's predictions.
    """
    options = {name: kwargs.pop(name) for name in option_defaults() if name in kwargs}
    ties = kwargs.pop("tie_word_embeddings", None)
    known = ", ".join([*option_defaults(), "tie_word_embeddings"])
    check_options(options)  # before a large model is loaded
    if isinstance(model, PreTrainedModel):
        if kwargs:
            raise ValueError(f"options: expected {known}, given {', '.join(sorted(kwargs))}")
        refuse_mixture(model.config, type(model).__name__)
        backbone: Any = share_weights(model)
    elif isinstance(model, (str, os.PathLike)):
        backbone = load_causal_lm(model, known, kwargs)
    else:
        advice = " Merge it first: PeftModel.merge_and_unload()." if hasattr(model, "peft_config") else ""
        raise ValueError(f"model: expected a path, a Hub id or a causal LM, given {type(model).__name__}.{advice}")
    projection = output_projection(backbone)
    if (size := options.get("shortlist_size")) is not None and size > projection.out_features:
        raise ValueError(f"shortlist_size: expected at most {projection.out_features}, all classes, given {size}")
    options["latent_scale"] = options.get("latent_scale") or default_scale(projection.in_features)
    refuse_changed_weights(backbone)
    forget_quantizer(backbone)
    tied = is_tied(backbone, projection)
    if ties and not tied:
        raise ValueError("tie_word_embeddings: expected False, the model's own head is not tied, given True")
    part_device_map(backbone, projection)
    softmax_class: Any = type(backbone)
    made = model_class_for(softmax_class)
    if not issubclass(made if cls is MoSForCausalLM else cls, made):
        raise ValueError(f"model: expected a {cls.backbone_class.__name__}, given a {type(backbone).__name__}")
    config: Any = adopt(backbone.config, options)
    for holder in (config, config.get_text_config()):  # some configs take that of their text config when loaded
        holder.tie_word_embeddings = tied if ties is None else ties
    config.dtype = backbone.dtype
    result: Any = backbone
    change_class(result, made if cls is MoSForCausalLM else cls)
    config.architectures = [type(result).__name__]
    result.put_head()
    for module in result.modules():
        module._is_hf_initialized = True  # nothing may draw its weights again
    result.describe_head()
    if not config.tie_word_embeddings:
        untie(result)
    # PEFT would name it as the base of an adapter, and then ask the class of the mixture's config for its config.
    result.name_or_path = ""
    return result


MoSForCausalLM.from_causal_lm = classmethod(from_causal_lm)  # type: ignore[assignment, method-assign]


def to_softmax(model: MoSForCausalLM) -> PreTrainedModel:
    """Equivalent to: the softmax model with the layers and the decoder of a mixture, whose shifts and prior are left.

    Its class and config are the softmax model's own, so that tools which know no mixture read what it saves. The
    weights are not copied. Before training it predicts what the mixture does. Of a trained mixture it is what
    `hf-mos inspect` calls the old softmax, `log_softmax(h @ W.T)`, and usually worse than the mixture.

    A decoder `W (I + latent_scale * mean shift)` could keep the mean of the shifts: outside the shortlist the mixture
    has its logits. It was worse on four of four trained mixtures, by 0.16 to 0.36 nats (`tests/export_latents.py`), as
    the mean counts components that the prior hardly uses. It would also untie the decoder.

    Raises:
        ValueError: the head is no mixture's, computes other latents, or has an adapter; or a weight is quantized,
            sharded or offloaded.
    """
    head: Any = model.mos_head
    path = model.head_path()
    if head is None or not is_own(head):
        given = type(model.get_output_embeddings() if head is None else head).__name__
        raise ValueError(f"{path}: expected a MoSLMHead, whose latents are h and shifts, given {given}")
    refuse_changed_weights(model)
    parted = next((name for name, weight in model.named_parameters() if weight.is_meta or not is_plain(weight)), None)
    if parted is not None:
        raise ValueError(f"model: expected whole weights in memory, given {parted}, sharded or offloaded")
    mixture = tuple(f"{path}.{name}." for name in ("prior", "shift", "widening"))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(mixture)}
    backbone: Any = model.backbone_class
    with head.weight.device, init.no_init_weights():
        softmax = backbone(softmax_config(model.config, backbone))
    softmax.load_state_dict(weights, assign=True)
    softmax.tie_weights()
    softmax.generation_config = copy.deepcopy(model.generation_config)
    return softmax.train(model.training)


MoSForCausalLM.to_softmax = to_softmax  # type: ignore[attr-defined]


def softmax_config(config: Any, backbone: type[PreTrainedModel]) -> PreTrainedConfig:
    """A mixture's config without the fields of the mixture and its file, and the softcap under its own name."""
    plain = copy.deepcopy(config)
    if config.softcap is not None and (found := find_softcap_field(plain)) is not None:
        setattr(*found, config.softcap)
    for name in (*option_defaults(), "softcap"):
        delattr(plain, name)
    vars(plain).pop("auto_map", None)
    plain.__class__ = config.backbone_config_class
    plain.architectures = [backbone.__name__]
    plain.name_or_path = ""
    return plain


def untie(model: Any) -> None:
    """Gives its own values to each weight that `tie_word_embeddings` tied: the decoder, in BERT its bias too."""
    kept = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name, source in model.all_tied_weights_keys.items():
        weight, other = attrgetter(name, source)(model)
        if name not in kept and weight is other:
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, copy.deepcopy(weight))
    model.all_tied_weights_keys = kept


def load_causal_lm(model: str | os.PathLike, known_options: str, kwargs: dict[str, Any]) -> Any:
    """Loads a softmax model by the arguments of `from_pretrained`."""
    if kwargs.get("output_loading_info"):
        raise ValueError("output_loading_info: expected False, as a model alone is returned, given True")
    folder = Path(model, kwargs.get("subfolder", ""))
    refuse_unfinished_save(folder)
    if (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"model: expected the folder of a causal LM, given {str(folder)!r}, which holds an adapter alone. "
            "AutoModelForCausalLM loads it with its model. To convert a softmax model with an adapter, load it so. "
            "Merge it first: PeftModel.merge_and_unload()."
        )
    if isinstance(kwargs.get("config"), (str, os.PathLike)):  # AutoModelForCausalLM would pass over a path
        kwargs["config"] = AutoConfig.from_pretrained(kwargs["config"])
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    except TypeError as error:  # from_pretrained hands unknown arguments to the model's constructor
        raise ValueError(f"options: expected {known_options}, or those of from_pretrained: {error}") from error
    except ValueError as error:
        if other := re.match(r"Unrecognized configuration class <class '.*?(\w+)'>", str(error)):
            raise ValueError(not_causal(other[1], repr(str(model)))) from error  # without a list of all classes
        raise
    refuse_mixture(loaded.config, repr(str(model)))
    return loaded


def is_tied(model: Any, projection: nn.Linear) -> bool:
    """Whether the decoder's weight is the input embedding's."""
    if projection.weight.is_meta:  # offloading makes two parameters of a tied one
        return bool(model.config.get_text_config().tie_word_embeddings)
    return projection.weight is model.get_input_embeddings().weight


def part_device_map(model: Any, projection: nn.Module) -> None:
    """Gives the head its own entry in `hf_device_map`, by which transformers saves offloaded weights."""
    given = vars(model).get("hf_device_map")
    if given is None:
        if hasattr(model, "_hf_hook") and any(weight.is_meta for weight in model.parameters()):
            model.hf_device_map = {"": "cpu"}  # accelerate's cpu_offload makes no map
        return
    path = next(name for name, module in model.named_modules() if module is projection)
    covering = max((key for key in given if f"{path}.".startswith(f"{key}." if key else "")), key=len)
    model.hf_device_map = given | ({path: given[covering]} if covering else {})


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


def refuse_unfinished_save(folder: Path) -> None:
    """Raises a ValueError for a folder whose first save was killed: it holds no checkpoint yet."""
    unfinished = sorted(path.name for path in folder.glob(f"{STAGING_PREFIX}*"))
    if unfinished and not (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"model: expected a checkpoint, given {str(folder)!r}, which holds an unfinished save, {unfinished[0]}, "
            "and nothing to load. Save the model again"
        )


def refuse_mixture(config: PreTrainedConfig, given: str) -> None:
    """Raises a ValueError for the config of a mixture, also of the class in the code beside a checkpoint."""
    if config.model_type == MODEL_TYPE or isinstance(config, MoSConfig):
        raise ValueError(f"model: expected a causal LM with a softmax head, given {given}, a mixture already")


def refuse_remote_code(kind: type, given: str) -> None:
    """Raises a ValueError for the class of a model or config that lies beside a checkpoint."""
    if kind.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
        raise ValueError(
            f"model: expected a causal LM of transformers, given {given}, whose {kind.__name__} is code beside a "
            "checkpoint (trust_remote_code); a mixture is saved without it and could not be loaded"
        )


def refuse_other_models(config: PreTrainedConfig, given: str) -> None:
    """Raises a ValueError for the config of a model that `AutoModelForCausalLM` does not load."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(not_causal(type(config).__name__, given))


def not_causal(config_class: str, given: str) -> str:
    return f"model: expected a causal LM, given {given}, a {config_class}, which is not one"


def output_projection(model: PreTrainedModel) -> nn.Linear:
    """Returns the model's vocabulary projection; raises a ValueError where none can be taken off."""

    def refuse(expected: str, given: str) -> NoReturn:
        raise ValueError(f"model: expected a causal LM {expected}, given {type(model).__name__} {given}")

    for kind in (type(model.config), type(model)):
        refuse_remote_code(kind, type(model).__name__)
    if model.config.is_encoder_decoder:
        refuse("without an encoder", "that has one")
    if "labels" not in inspect.signature(model.forward).parameters:
        refuse("whose forward takes labels", "that is no language model by itself")
    for name, value in OWN_LOSSES.items():
        if (given := getattr(model.config, name, value)) != value:
            advice = f"The loss of a mixture has no such part: set config.{name} = {value} first"
            raise ValueError(f"{name}: expected {value}, given {given}. {advice}")
    if model.config.model_type in WRITES_LOGITS:
        refuse("whose forward returns the head's logits as they are", "that writes some classes' logits itself")
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


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the model's modules and configs around the same tensors."""
    modules = [*model.modules()]
    kept = (value for module in modules for value in vars(module).values() if isinstance(value, Tensor))
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *kept)}
    return copy.deepcopy(model, memo)
