"""Loads a causal LM, mixture or not, and its tokenizer, from a folder or the Hub."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..conversion import refuse_other_models, refuse_unfinished_save
from ..remote_code.configuration_mos import MoSConfig
from .places import check_exists

# Weights of a causal LM cannot be loaded in others: integers, complex numbers, and the eight bits of a quantizer.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Equivalent to: `AutoModelForCausalLM.from_pretrained(model, ...).eval()`, on the accelerator if there is one.

    Args:
        model: folder or Hub id.
        revision: commit, branch or tag, of the weights and of remote code both.
        dtype: of the weights, a name of torch's; `"auto"`: as saved.
        device: as in torch, or `"auto"` to spread the model over several. `None`: an accelerator, else the CPU.
        trust_remote_code: run the repository's own code. A mixture needs none: hf_mos is here.

    Raises:
        OSError: there is no such model.
        ValueError: an option is unknown, or the model is none that loads.
    """
    check_dtype(dtype)
    hub = hub_options(revision, trust_remote_code)
    load_config(model, **hub)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=choose_device(device), **hub).eval()


def check_options(
    model: str, tokenizer: str | None, revision: str | None, dtype: str, device: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """Returns the model's config; raises a ValueError for an option of [`load_model`] that is refused."""
    check_dtype(dtype)
    if device not in (None, "auto"):
        check_device(str(device))
    if tokenizer is not None:
        check_exists(tokenizer)
    return load_config(model, **hub_options(revision, trust_remote_code))


def load_config(model: str | Path, **hub: Any) -> PreTrainedConfig:
    """Equivalent to: `AutoConfig.from_pretrained(model, ...)`, but only for a causal LM, mixture or not.

    Raises:
        OSError: there is no such model.
        ValueError: it is no causal LM.
    """
    if not Path(model).is_file():  # a config may be a file
        check_exists(model)
    refuse_unfinished_save(Path(model))
    config = AutoConfig.from_pretrained(model, **hub)
    refuse_other_models(config, repr(str(model)))
    refuse_encoder(config, repr(str(model)))
    return config


def refuse_encoder(config: PreTrainedConfig, given: str) -> None:
    """Raises a ValueError for the config of an encoder such as BERT, which is a causal LM with `is_decoder` alone."""
    mapping: Any = AutoModelForMaskedLM._model_mapping
    if type(config) in mapping and getattr(config, "is_decoder", None) is False:
        raise ValueError(
            f"model: expected a causal LM, given {given}, a {type(config).__name__} with is_decoder false: each of "
            "its tokens sees those after it. If it was trained as a causal LM, set is_decoder to true in config.json"
        )


def load_tokenizer(
    model: str | Path, tokenizer: str | None = None, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Equivalent to: `AutoTokenizer.from_pretrained(model, ...)`.

    Args:
        model: folder or Hub id of the model.
        tokenizer: folder or Hub id of a tokenizer that is not the model's own; `revision` does not choose its commit.
        revision, trust_remote_code: as in [`load_model`].

    Raises:
        OSError: there is no such model.
        ValueError: it has no tokenizer. For some architectures transformers makes one up, of special tokens alone.
    """
    source, revision = (model, revision) if tokenizer is None else (tokenizer, None)
    check_exists(source)
    loaded = AutoTokenizer.from_pretrained(source, **hub_options(revision, trust_remote_code))
    if set(loaded.get_vocab()) <= set(loaded.all_special_tokens):
        raise ValueError(f"tokenizer: expected the files of one in {str(source)!r}, given none")
    return loaded


def hub_options(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """The arguments of `from_pretrained` that choose a commit, for the weights and for remote code."""
    revisions = {} if revision is None else {"revision": revision, "code_revision": revision}
    return {"trust_remote_code": trust_remote_code, **revisions}


def choose_device(device: str | None) -> str:
    if device is not None:
        if device != "auto":
            check_device(device)
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def check_dtype(dtype: str) -> None:
    if dtype != "auto" and getattr(torch, dtype, None) not in DTYPES:
        raise ValueError(f"dtype: expected 'auto' or a dtype of torch such as 'bfloat16', given {dtype!r}")


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that torch can use, given {device!r}: {reason}") from error


def is_mixture(config: PreTrainedConfig) -> bool:
    """Whether the config is that of a mixture, from the installed hf_mos or from the code beside a checkpoint."""
    return any(base.__name__ == MoSConfig.__name__ for base in type(config).__mro__)
