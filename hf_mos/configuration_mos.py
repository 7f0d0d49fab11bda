"""MoSConfig: the backbone's config plus the options of the mixture head."""

import copy
import dataclasses
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

LATENT_ACTIVATIONS = ("identity", "tanh")

# What the architectures of transformers call the softcap that they apply to their logits. It belongs inside each
# component of the mixture, so it is taken out of the backbone's config and kept in ours.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Where such a field may not be None: `tanh(h / 2^64) * 2^64` is h, to the bit, in fp32 and in bf16.
NO_SOFTCAP = 2.0**64


def _delegated(name: str) -> property:
    """A config attribute that lives in the backbone's text config; absent here where it is absent there."""

    def get(self: "MoSConfig") -> Any:
        return getattr(self.get_text_config(), name)

    def set_(self: "MoSConfig", value: Any) -> None:
        setattr(self.get_text_config(), name, value)

    return property(get, set_, doc=f"`{name}` of the backbone's text config.")


class MoSConfig(PreTrainedConfig):
    r"""Configuration of [`MoSForCausalLM`]: a causal LM's config and its mixture-of-softmaxes head.

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            The backbone: the config of any causal LM in transformers. Required.
        num_mixtures (`int`, defaults to 4):
            K, the number of softmaxes that are mixed.
        latent_size (`int`, *optional*):
            E, the width of each component's latent. `None`: the decoder's input width. Another width needs an untied
            decoder, as the input embedding has the backbone's width.
        latent_rank (`int`, *optional*):
            R: the components differ only inside one fixed subspace of this rank that they share, `latents_k = h +
            basis @ shift_k(h)`, at the cost of 1 + K R / E softmax heads instead of K. `None`: full latents.
        latent_activation (`str`, defaults to `"identity"`):
            `"identity"`, or `"tanh"` as in the paper; it acts on the latents, with `latent_rank` on the shifts. A full
            latent behind a tanh cannot be put on a trained model unchanged.
        latent_bias (`bool`, defaults to `False`), prior_bias (`bool`, defaults to `False`):
            Whether the latent projection and the prior have a bias.
        latent_dropout (`float`, defaults to 0.0):
            Dropout probability on the latents, with `latent_rank` on the shifts, in training, in [0, 1).
        balance_coefficient (`float`, defaults to 0.0):
            In training, the loss of each token gets this times the squared coefficient of variation of the mean
            mixture weights: 0 where the components are used alike, K - 1 where one is used alone. It revives
            components that starve; 0.01 is mild.
        decoder_bias (`bool`, *optional*):
            Whether the decoder has a bias. `None`: as the backbone's own head.
        softcap (`float`, *optional*):
            `softcap * tanh(component_logits / softcap)` inside each component. `None`: as the backbone's own head.
        tie_word_embeddings (`bool`, *optional*):
            Whether the decoder is the input embedding. `None`: as the backbone says.
        skip_logits_in_training (`bool`, defaults to `True`):
            In training mode, a call with `labels` returns `logits=None`: the loss never makes a vocabulary-wide
            tensor. `False` returns the logits as well, at their cost in memory.

    Raises:
        ValueError: a field is of the wrong type or out of range; the message names the field, what was expected and
            what was given.
    """

    model_type = "mos"
    has_no_defaults_at_init: ClassVar[bool] = True  # a mixture head has no meaning without its backbone
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache_params", "state", "mems"]

    text_config: Any = None
    num_mixtures: int = 4
    latent_size: int | None = None
    latent_rank: int | None = None
    latent_activation: str = "identity"
    latent_bias: bool = False
    prior_bias: bool = False
    latent_dropout: float = 0.0
    balance_coefficient: float = 0.0
    decoder_bias: bool | None = None
    softcap: float | None = None
    tie_word_embeddings: bool | None = None
    skip_logits_in_training: bool = True

    vocab_size = _delegated("vocab_size")
    hidden_size = _delegated("hidden_size")
    num_hidden_layers = _delegated("num_hidden_layers")
    num_attention_heads = _delegated("num_attention_heads")
    num_key_value_heads = _delegated("num_key_value_heads")
    head_dim = _delegated("head_dim")
    max_position_embeddings = _delegated("max_position_embeddings")
    layer_types = _delegated("layer_types")
    sliding_window = _delegated("sliding_window")
    initializer_range = _delegated("initializer_range")
    use_cache = _delegated("use_cache")
    bos_token_id = _delegated("bos_token_id")
    eos_token_id = _delegated("eos_token_id")
    pad_token_id = _delegated("pad_token_id")

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _read_text_config(self.text_config)
        softcap = take_softcap(self.text_config)
        if self.softcap is None:
            self.softcap = softcap
        elif softcap is not None and softcap != self.softcap:
            raise ValueError(f"softcap: expected the backbone's own, {softcap}, or None, given {self.softcap!r}")
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self._check_fields()
        # The base class writes its attention and experts implementations, None unless given, over the sub-configs'
        # own. Those of a loaded backbone are in use and must stay.
        text_config = self.text_config
        own = {name: kwargs.pop(name, None) for name in ("attn_implementation", "experts_implementation")}
        self.text_config = None
        super().__post_init__(**kwargs)
        self.text_config = text_config
        if own["attn_implementation"] is not None:
            self._attn_implementation = own["attn_implementation"]
        if own["experts_implementation"] is not None:
            self._experts_implementation = own["experts_implementation"]

    def _check_fields(self) -> None:
        def require(field: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"{field}: expected {expected}, given {getattr(self, field)!r}")

        def is_int(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        require("num_mixtures", is_int(self.num_mixtures) and self.num_mixtures >= 1, "an int of at least 1")
        size = self.latent_size
        require("latent_size", size is None or (is_int(size) and size >= 1), "an int of at least 1, or None")
        rank = self.latent_rank
        require("latent_rank", rank is None or (is_int(rank) and rank >= 1), "an int of at least 1, or None")
        if rank is not None:
            require("latent_size", size is None, "None with latent_rank, whose latents have the width of the input,")
        activations = " or ".join(repr(name) for name in LATENT_ACTIVATIONS)
        require("latent_activation", self.latent_activation in LATENT_ACTIVATIONS, activations)
        for field in ("latent_bias", "prior_bias", "tie_word_embeddings", "skip_logits_in_training"):
            require(field, isinstance(getattr(self, field), bool), "a bool")
        require("decoder_bias", self.decoder_bias is None or isinstance(self.decoder_bias, bool), "a bool or None")
        dropout = self.latent_dropout
        is_number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
        require("latent_dropout", is_number and 0 <= dropout < 1, "a number in [0, 1)")
        balance = self.balance_coefficient
        is_number = isinstance(balance, (int, float)) and not isinstance(balance, bool)
        require("balance_coefficient", is_number and 0 <= balance < float("inf"), "a finite number of at least 0")
        cap = self.softcap
        is_number = isinstance(cap, (int, float)) and not isinstance(cap, bool)
        require("softcap", cap is None or (is_number and 0 < cap < float("inf")), "a finite number above 0, or None")
        if self.tie_word_embeddings and size is not None:
            width = embedding_size(self.text_config)
            if width is not None and size != width:
                raise ValueError(
                    f"latent_size: expected {width}, the width of the input embedding that the decoder is tied to, "
                    f"or tie_word_embeddings=False, given {size}"
                )

    def validate(self) -> None:
        """Of this config its own fields, and of the backbone's what its own class checks.

        The base class's checks would read the delegated fields, which an architecture may define in its own way, or
        for each layer.
        """
        self._check_fields()
        self.text_config.validate()

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        model_type = config_dict.get("model_type")
        if model_type != cls.model_type:
            raise ValueError(
                f"model_type: expected {cls.model_type!r}, given {model_type!r}. To put a mixture head on that model, "
                "call MoSForCausalLM.from_causal_lm(...) with its path."
            )
        return super().from_dict(config_dict, **kwargs)


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
    """The config, top or text part, that sets `field`."""
    for config in (text_config, text_config.get_text_config()):
        if vars(config).get(field) not in (None, NO_SOFTCAP):
            return config
    return None


def take_softcap(text_config: PreTrainedConfig) -> float | None:
    """Removes the backbone's logit softcap from its config, in place, and returns it (`None`: it has none)."""
    softcap = None
    for field in SOFTCAP_FIELDS:
        holder = _holder(text_config, field)
        if holder is not None:
            softcap = float(vars(holder)[field])
            types: dict[str, Any] = {declared.name: declared.type for declared in dataclasses.fields(holder)}
            setattr(holder, field, None if isinstance(None, types.get(field, object)) else NO_SOFTCAP)
    return softcap


def embedding_size(text_config: PreTrainedConfig) -> int | None:
    """Width of the input embedding, as far as a config tells (`None`: it does not)."""
    config = text_config.get_text_config()
    for field in ("word_embed_proj_dim", "embedding_size", "hidden_size"):
        if isinstance(size := getattr(config, field, None), int):
            return size
    return None
