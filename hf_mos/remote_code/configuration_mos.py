"""MoSConfig: the backbone's own config with the options of the mixture head, each with its help text.

The class of a config is made on first use: `MoSLlamaConfig(LlamaConfig, MoSConfig)`. In memory
`model_type` is the backbone's, so that transformers' and PEFT's tables find it. The file says `"model_type": "mos"`,
so that nobody loads it as a softmax model, and names the backbone's beside it.
"""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE, BACKBONE_TYPE = "mos", "backbone_model_type"  # the first is the file's `model_type`
PREFIX = "MoS"  # of the name of a made class
# 320 / D (`learning_rates.py`), from scratch 3.2 / D (`from_scratch.py`): in a step of Adam all widths change alike.
TRAINED_SCALE, FROM_SCRATCH_SCALE = 320.0, 3.2  # times 1 / D. Source: Yang et al., arXiv 2203.03466
ALWAYS_FULL, SMALLEST_RANK, LARGEST_RANK = 64, 8, 128  # at D = 576, 128 gains like a full rank (`real_model.py`)
# The names of a logit softcap in transformers' configs. It belongs inside each component of the mixture, so a model
# that is made moves it from there to `softcap`; the file keeps it under the architecture's name.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Replaces a softcap that may not be None: `tanh(h / 2^64) * 2^64` is h, to the bit, in fp32 and in bf16.
NO_SOFTCAP = 2.0**64
# A config of no model type, which AutoTokenizer finds where it may not run the code of this one: so it does not warn.
TOKENIZER_CONFIG = "tokenizer_without_code"
FILE_FIELDS = ("model_type", BACKBONE_TYPE, TOKENIZER_CONFIG)  # that no config in memory has
LISTENERS: list[Callable[[Any], None]] = []  # called with each config class that is made


def option(default: Any, help: str) -> Any:
    """A field of the head with its help text, from which the commands make a flag."""
    return dataclasses.field(default=default, metadata={"help": help})


class MoSConfig(PreTrainedConfig):
    """Configuration of [`MoSForCausalLM`]: a causal LM's config and the options of its mixture head.

    Make one with [`~MoSConfig.from_backbone_config`]; `from_pretrained` and `from_dict` read a saved one. The result
    is of a class made from this one and the backbone's. ValueError where a field is of a wrong type or out of range.
    """

    model_type = MODEL_TYPE
    backbone_config_class: ClassVar[Any] = None  # of a made class

    num_mixtures: int = option(16, "K, the number of softmaxes. D below is the hidden size, V the vocabulary size.")
    shortlist_size: int | None = option(
        64,
        "M: components differ only on the M likeliest classes; elsewhere they share the logits of the mean latent. "
        "None: they differ on all classes, at the cost of K softmaxes.",
    )
    shift_rank: int | None = option(
        None,
        "r, rank of shifts, of (K + 1) r D weights, K D D if r = D. None: D if D <= 64 or K D <= V / 8, else <= 128.",
    )
    latent_scale: float | None = option(
        None,
        "Multiplies the shifts and the input of the prior. None: 320 / D, and 3.2 / D from scratch. Beside an "
        "adapter, which needs a high learning rate, set a lower scale, such as 0.1.",
    )
    init_seed: int = option(0, "Seed of the head's initial weights, which do not depend on torch.manual_seed.")
    softcap: float | None = None  # the backbone's own, in a config whose model is made

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone_config_class is None:
            raise ValueError("MoSConfig: expected MoSConfig.from_backbone_config(config), given no backbone's config")
        check_options({name: getattr(self, name) for name in option_defaults()})
        super().__post_init__(**kwargs)

    @classmethod
    def from_backbone_config(cls, config: PreTrainedConfig, **options: Any) -> "MoSConfig":
        """Equivalent to: a copy of the config of any causal LM, with the fields of this class as `options`."""
        if not isinstance(config, PreTrainedConfig) or isinstance(config, MoSConfig):
            given = "a mixture's" if isinstance(config, MoSConfig) else type(config).__name__
            raise ValueError(f"config: expected the config of a causal LM with a softmax head, given {given}")
        check_options(options)
        return adopt(copy.deepcopy(config), options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Like `PreTrainedConfig.from_pretrained`; the class of the result is the one that the file names."""
        return super(MoSConfig, MoSConfig).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like `PreTrainedConfig.from_dict`; the class of the result is the one that the dict names."""
        model_type, backbone_type = config_dict.get("model_type"), config_dict.get(BACKBONE_TYPE)
        own = model_type == MODEL_TYPE or (cls is not MoSConfig and model_type == cls.model_type)
        if not own and "num_mixtures" not in config_dict:
            advice = "To put a mixture head on another model, call MoSForCausalLM.from_causal_lm."
            raise ValueError(f"model_type: expected {MODEL_TYPE!r}, given {model_type!r}. {advice}")
        if (known := backbone_type if model_type == MODEL_TYPE else model_type) not in CONFIG_MAPPING:
            raise ValueError(f"{BACKBONE_TYPE}: expected a model type that transformers knows, given {known!r}")
        backbone: Any = CONFIG_MAPPING[known]  # type: ignore[index]
        made = cls if cls is not MoSConfig else config_class_for(backbone)
        own_fields = {name: config_dict[name] for name in config_dict if name not in FILE_FIELDS}
        return made.backbone_config_class.from_dict.__func__(made, own_fields, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """Like `PreTrainedConfig.from_json_file`; the class of the result is the one that the file names."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of the file: this config, and `model_type` as the file says it."""
        content = json.loads(super().to_json_string(use_diff))
        softcap = content.pop("softcap", None)
        if softcap is not None and (found := find_softcap_field(self)) is not None:
            holder, field = found
            inner = next((name for name, value in vars(self).items() if value is holder), None)
            (content if inner is None else content.setdefault(inner, {}))[field] = softcap
        content |= {"model_type": MODEL_TYPE, BACKBONE_TYPE: self.model_type, TOKENIZER_CONFIG: {"model_type": ""}}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def adopt(config: Any, options: dict[str, Any]) -> Any:
    """Turns a backbone's config into a mixture's, in place, because the layers of a model hold it too."""
    backbone: Any = type(config)
    config.__class__ = config_class_for(backbone)
    for name, value in (option_defaults() | {"softcap": None} | options).items():
        setattr(config, name, value)
    return config


def option_defaults() -> dict[str, Any]:
    """The options of the head and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(MoSConfig) if "help" in field.metadata}


def check_options(options: dict[str, Any]) -> None:
    """Raises a ValueError for an unknown option, and for one that has a wrong type or is out of range."""
    if unknown := sorted(options.keys() - option_defaults().keys()):
        raise ValueError(f"options: expected {', '.join(option_defaults())}, given {', '.join(unknown)}")
    expected: dict[str, tuple[Any, str]] = {
        "num_mixtures": (int, "an int of at least 1"),
        "shortlist_size": (int | None, "an int of at least 1, or None"),
        "shift_rank": (int | None, "an int of at least 1, or None"),
        "init_seed": (int, "an int of at least 0"),
        "latent_scale": (int | float | None, "a finite number above 0, or None"),
    }
    for name, value in options.items():
        types, words = expected[name]
        least = 0 if name == "init_seed" else math.ulp(0)
        if not isinstance(value, types) or isinstance(value, bool) or not (value is None or least <= value < math.inf):
            raise ValueError(f"{name}: expected {words}, given {value!r}")


@functools.cache
def config_class_for(backbone: Any) -> type[MoSConfig]:
    """The class of the configs of mixtures with this backbone, importable from this module as `MoS` + its name."""
    name = PREFIX + backbone.__name__
    members: dict[str, Any] = {own: vars(MoSConfig)[own] for own in ("from_pretrained", "from_dict", "to_json_string")}
    members |= {"__module__": __name__, "__qualname__": name}
    members |= {"backbone_config_class": backbone, "model_type": backbone.model_type}
    # `__name__` is the same in all of them, as `AutoModelForCausalLM.register` compares it.
    globals()[name] = made = type("MoSConfig", (backbone, MoSConfig), members)
    for listener in LISTENERS:
        listener(made)
    return made


def __getattr__(name: str) -> type[MoSConfig]:
    """Makes the config class of a backbone of transformers: `MoSLlamaConfig`."""
    backbone: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(backbone, type) and PreTrainedConfig in backbone.mro()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class_for(backbone)


def default_rank(num_mixtures: int, width: int, num_classes: int) -> int:
    """Rank of the shifts: full if it costs at most an eighth of the decoder, else 128, or less to cost a sixteenth."""
    if width <= ALWAYS_FULL or num_mixtures * width <= num_classes / 8:
        return width
    return min(LARGEST_RANK, 1 << (max(SMALLEST_RANK, num_classes // (16 * num_mixtures)).bit_length() - 1))


def default_scale(width: int, from_scratch: bool = False) -> float:
    """The scale of the shifts and of the prior's logits, by the width of the hidden state that the head reads."""
    return (FROM_SCRATCH_SCALE if from_scratch else TRAINED_SCALE) / width


def find_softcap_field(
    config: PreTrainedConfig, is_set: Callable[[Any], bool] = lambda value: True
) -> tuple[PreTrainedConfig, str] | None:
    """The config, or the text config in it, that has a softcap's field, and the name of the field."""
    holders = (config, config.get_text_config())
    pairs = ((holder, field) for field in SOFTCAP_FIELDS for holder in holders if field in vars(holder))
    return next(((holder, field) for holder, field in pairs if is_set(vars(holder)[field])), None)


def take_softcap(config: PreTrainedConfig) -> float | None:
    """Removes the logit softcap from a model's config, in place, and returns it; `None` if it has none."""
    if (found := find_softcap_field(config, lambda value: value not in (None, NO_SOFTCAP))) is None:
        return None
    holder, field = found
    softcap = float(vars(holder)[field])
    types: dict[str, Any] = {declared.name: declared.type for declared in dataclasses.fields(holder)}
    setattr(holder, field, None if isinstance(None, types.get(field, object)) else NO_SOFTCAP)
    return softcap
