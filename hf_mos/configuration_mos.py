"""MoSConfig: the backbone's config, and the options of the mixture head with the help text of each."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

LATENT_ACTIVATIONS = ("identity", "tanh")

# Adam moves every weight by the learning rate. So the change of a layer's output in a step grows with its width D, and
# the scale of the head's layers must fall as 1 / D to give every width the same change: 10 at D = 32, 0.56 at D = 576.
# `examples/softmax_bottleneck/learning_rates.py` compares other products. Source: Yang et al., arXiv 2203.03466.
SCALE_TIMES_WIDTH = 320.0

# The names that transformers' architectures give the softcap of their logits. It belongs inside each component of the
# mixture, so it is moved from the backbone's config to this one.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Replaces a softcap that may not be None: `tanh(h / 2^64) * 2^64` is h, to the bit, in fp32 and in bf16.
NO_SOFTCAP = 2.0**64

# The config of no model type that AutoTokenizer reads where it may not run the code of this one: it finds one in a
# config.json, and warns of the type of the model where it finds none.
TOKENIZER_CONFIG = "tokenizer_without_code"

# A field that MoSConfig does not define is the backbone's. So are the fields of transformers' base config, except for
# those that describe this checkpoint or what the mixture returns.
OWN_BASE_FIELDS = ("architectures", "dtype", "return_dict", "transformers_version")
DELEGATED = {
    field.name: field.default for field in dataclasses.fields(PreTrainedConfig) if field.name not in OWN_BASE_FIELDS
} | {"num_labels": None, "output_attentions": False, "per_layer_config": None}  # these are properties there
# Attributes that describe this checkpoint too, though no class declares them.
OWN_ATTRIBUTES = ("auto_map", "distributed_config", "quantization_config", "transformers_weights")


def option(default: Any, help: str, as_flag: bool = True) -> Any:
    """A field of the head with its help text. `as_flag`: the commands offer it, as a conversion may set it."""
    return dataclasses.field(default=default, metadata={"help": help, "as_flag": as_flag})


class MoSConfig(PreTrainedConfig):
    """Configuration of [`MoSForCausalLM`]: a causal LM's config and the options of its mixture head.

    Args:
        text_config (`PreTrainedConfig` or `dict`): the backbone, any causal LM of transformers. Required.
        kwargs: the fields below, each with its help text, and the arguments of `PreTrainedConfig`.

    Raises:
        ValueError: a field has a wrong type or is out of range: "field: expected X, given Y".
    """

    model_type = "mos"
    has_no_defaults_at_init: ClassVar[bool] = True  # a mixture head has no meaning without its backbone
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache_params", "state", "mems"]

    text_config: Any = None
    num_mixtures: int = option(
        4,
        "K, the number of softmaxes. A conversion that sets neither this nor latent_rank, shortlist_size, latent_size "
        "or latent_activation takes 16 on a shortlist of 64 classes where V is 4096 or more.",
    )
    latent_size: int | None = option(None, "E, the width of the latents; None: the decoder's.", as_flag=False)
    latent_rank: int | None = option(
        None, "R: let the components differ in one shared subspace of this rank, for 1 + K R / E softmaxes in cost."
    )
    shortlist_size: int | None = option(
        None,
        "M: let the components differ only on the M likeliest classes; elsewhere they share the logits of their mean. "
        "Costs little more than one softmax, whatever K.",
    )
    latent_scale: float | None = option(
        None,
        "Multiplies the effective learning rate of the shifts and the prior; None: 320 / D, measured at D = 32 and "
        "576. Beside an adapter, which needs a high learning rate, set a lower one, such as 0.1.",
    )
    latent_activation: str = option(
        "identity",
        "identity, or tanh as in the paper; tanh without a latent rank changes a trained model's predictions.",
    )
    latent_bias: bool = option(False, "Give the layer of the shifts, or of the latents, a bias.")
    prior_bias: bool = option(False, "Give the prior a bias.")
    latent_dropout: float = option(0.0, "Dropout probability on the latents, or the shifts, in training, in [0, 1).")
    balance_coefficient: float = option(
        0.0,
        "Weight of a balance loss in training: the squared coefficient of variation of the mean mixture "
        "weights (0: all equal; K - 1: only one used). On a shortlist, of the mean gate. Revives starved components; "
        "0.01 is mild.",
    )
    # A conversion takes these from the backbone's own head.
    decoder_bias: bool | None = option(None, "Give the decoder a bias; None: as the backbone.", as_flag=False)
    softcap: float | None = option(
        None, "In each component: softcap * tanh(logits / softcap); None: as the backbone.", as_flag=False
    )
    tie_word_embeddings: bool | None = option(None, "Tie the decoder to the input embedding; None: as the backbone.")
    skip_logits_in_training: bool = option(
        True, "In training with labels leave out the logits, so that no tensor is as wide as V.", as_flag=False
    )

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _read_text_config(self.text_config)
        softcap = take_softcap(self.text_config)
        if self.softcap is None:
            self.softcap = softcap
        elif softcap is not None and softcap != self.softcap:
            raise ValueError(f"softcap: expected the backbone's own, {softcap}, or None, given {self.softcap!r}")
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.latent_scale is None:
            width = embedding_size(self.text_config)
            self.latent_scale = default_scale(width) if self.adds_shifts and width else 1.0
        self._check_fields()
        # The base class sets the attention and experts implementations of the sub-configs to None unless given, but a
        # loaded backbone uses its own.
        text_config, implementations = self.text_config, ("attn_implementation", "experts_implementation")
        own = {name: kwargs.pop(name, None) for name in implementations}
        given = {name: value for name, value in self._take_delegated().items() if value != DELEGATED[name]}
        given |= {name: kwargs.pop(name) for name in list(kwargs) if self._owner_of(name) is not None}
        given |= {f"_{name}": value for name, value in own.items() if value is not None}
        self.text_config = None
        super().__post_init__(**kwargs)
        self._take_delegated()
        self.text_config = text_config
        for name, value in given.items():
            setattr(self, name, value)

    def _take_delegated(self) -> dict[str, Any]:
        """Removes the fields of the backbone that a constructor has set in this config itself."""
        return {name: vars(self).pop(name) for name in DELEGATED if name in vars(self)}

    def _owner_of(self, name: str) -> PreTrainedConfig | None:
        """The config of the backbone that has a field; `None` where this config has it, or none has."""
        text_config = vars(self).get("text_config")
        if not isinstance(text_config, PreTrainedConfig) or name.startswith("_") or name in OWN_ATTRIBUTES:
            return None
        if name in DELEGATED:
            return text_config
        if hasattr(type(self), name):
            return None
        return next((c for c in (text_config.get_text_config(), text_config) if hasattr(c, name)), None)

    def __getattr__(self, name: str) -> Any:
        owner = self._owner_of(name)
        if owner is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(owner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self._owner_of(name)
        if owner is not None:
            setattr(owner, name, value)
        elif name in DELEGATED:  # the constructor sets these before there is a backbone's config
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def adds_shifts(self) -> bool:
        """Whether the latents are the hidden state plus shifts; else they are projections of it, as in the paper."""
        keeps_width = self.latent_size in (None, embedding_size(self.text_config))
        return self.latent_rank is not None or (keeps_width and self.latent_activation == "identity")

    def _check_fields(self) -> None:
        def require(field: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"{field}: expected {expected}, given {getattr(self, field)!r}")

        require("num_mixtures", is_count(self.num_mixtures), "an int of at least 1")
        for field in ("latent_size", "latent_rank", "shortlist_size"):
            value = getattr(self, field)
            require(field, value is None or is_count(value), "an int of at least 1, or None")
        size, width = self.latent_size, embedding_size(self.text_config)
        if self.latent_rank:
            fits = width is None or self.latent_rank <= width
            require("latent_rank", fits, f"at most D = {width}, the width of the hidden state")
            require("latent_size", size is None, "None with latent_rank, whose latents have the width of the input,")
        scale = self.latent_scale
        require("latent_scale", is_number(scale, lambda x: x > 0), "a finite number above 0, or None")
        if not self.adds_shifts:
            require("latent_scale", scale == 1, "1 or None where the latents are the paper's,")
            require("shortlist_size", self.shortlist_size is None, "None where the latents are the paper's,")
        activations = " or ".join(repr(name) for name in LATENT_ACTIVATIONS)
        require("latent_activation", self.latent_activation in LATENT_ACTIVATIONS, activations)
        for field in ("latent_bias", "prior_bias", "tie_word_embeddings", "skip_logits_in_training"):
            require(field, isinstance(getattr(self, field), bool), "a bool")
        require("decoder_bias", self.decoder_bias is None or isinstance(self.decoder_bias, bool), "a bool or None")
        require("latent_dropout", is_number(self.latent_dropout, lambda x: 0 <= x < 1), "a number in [0, 1)")
        balance, cap = self.balance_coefficient, self.softcap
        require("balance_coefficient", is_number(balance, lambda x: x >= 0), "a finite number of at least 0")
        require("softcap", cap is None or is_number(cap, lambda x: x > 0), "a finite number above 0, or None")
        fits = not self.tie_word_embeddings or None in (size, width) or size == width
        require("latent_size", fits, f"{width}, the width of the tied embedding, or tie_word_embeddings=False,")

    def validate(self) -> None:
        """Checks this config's own fields, then lets the backbone's config check itself.

        The base class would check the delegated fields, which an architecture may define in its own way, or by layer.
        """
        self._check_fields()
        self.text_config.validate()

    def _get_generation_parameters(self) -> dict[str, Any]:
        own = {name: value for name, value in super()._get_generation_parameters().items() if name in vars(self)}
        return self.text_config._get_generation_parameters() | own

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {TOKENIZER_CONFIG: {"model_type": ""}}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        model_type = config_dict.get("model_type")
        if model_type != cls.model_type:
            raise ValueError(
                f"model_type: expected {cls.model_type!r}, given {model_type!r}. To put a mixture head on that model, "
                "call MoSForCausalLM.from_causal_lm(...) with its path."
            )
        config_dict = {name: value for name, value in config_dict.items() if name != TOKENIZER_CONFIG}
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if config.adds_shifts and config_dict.get("latent_scale") is None:
            raise ValueError(
                "latent_scale: expected a number, given none: the checkpoint is of an earlier version, whose latents "
                "are computed in another way. Convert its softmax model again and train the mixture anew."
            )
        return result


def delegated(name: str) -> property:
    def get(self: MoSConfig) -> Any:
        owner = self._owner_of(name)
        return vars(self).get(name, DELEGATED[name]) if owner is None else getattr(owner, name)

    return property(get, lambda self, value: MoSConfig.__setattr__(self, name, value))


for _name in DELEGATED:
    setattr(MoSConfig, _name, delegated(_name))


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any, in_range: Callable[[float], bool]) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value < float("inf") and in_range(value)


def _read_text_config(text_config: Any) -> PreTrainedConfig:
    if isinstance(text_config, PreTrainedConfig):
        has_softcap = any(_holder(text_config, field) is not None for field in SOFTCAP_FIELDS)
        return copy.deepcopy(text_config) if has_softcap else text_config  # the caller's own object keeps its softcap
    if isinstance(text_config, dict) and text_config.get("model_type"):
        return AutoConfig.for_model(**text_config)
    raise ValueError(
        "text_config: expected the config of a causal LM, or its dict with a 'model_type', "
        f"given {text_config if text_config is None else type(text_config).__name__!r}"
    )


def _holder(text_config: PreTrainedConfig, field: str) -> PreTrainedConfig | None:
    """The config, or the text config in it, that sets `field`."""
    configs = (text_config, text_config.get_text_config())
    return next((config for config in configs if vars(config).get(field) not in (None, NO_SOFTCAP)), None)


def take_softcap(text_config: PreTrainedConfig) -> float | None:
    """Removes the logit softcap from the backbone's config, in place, and returns it; `None` if it has none."""
    softcap = None
    for field in SOFTCAP_FIELDS:
        if (holder := _holder(text_config, field)) is not None:
            softcap = float(vars(holder)[field])
            types: dict[str, Any] = {declared.name: declared.type for declared in dataclasses.fields(holder)}
            setattr(holder, field, None if isinstance(None, types.get(field, object)) else NO_SOFTCAP)
    return softcap


def default_scale(width: int) -> float:
    """The scale of the shifts and of the prior's logits, by the width of the hidden state that the head reads."""
    return SCALE_TIMES_WIDTH / width


def embedding_size(text_config: PreTrainedConfig) -> int | None:
    """The width of the input embedding; `None` if the config does not tell."""
    config = text_config.get_text_config()
    sizes = (getattr(config, field, None) for field in ("word_embed_proj_dim", "embedding_size", "hidden_size"))
    return next((size for size in sizes if isinstance(size, int)), None)
