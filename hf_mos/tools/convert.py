"""Converts a checkpoint with a softmax into one with a mixture, and measures the change of its predictions.

```python
conversion = convert("gpt2", Path("gpt2-mos"))
print(conversion.gap)  # the largest difference of the two heads, in nats
```
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..conversion import refuse_mixture, refuse_remote_code
from ..remote_code.modeling_mos import MoSForCausalLM
from ..remote_code.mos_decoder import cap_logits
from ..remote_code.mos_log_probs import mix_log_probs
from .evaluate import positions_of
from .exit_codes import before_work
from .head_options import check_head_options, describe_head
from .loading import check_options, load_model, load_tokenizer
from .places import check_is_folder, delete_unchanged, leftovers

logger = logging.get_logger(__name__)

LARGEST_GAP = 1e-6  # nats, in float64, for every width and dtype
ROWS_AT_A_TIME, TOKENS_AT_A_TIME = 8192, 16  # in float64
PROBE_SHAPE = (2, 64)  # sequences and tokens on which the two models are compared


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion, and the change of the predictions."""

    folder: str
    num_mixtures: int
    shortlist_size: int | None
    num_parameters: int
    num_new_parameters: int
    gap: float  # the largest difference of the two heads' log-probabilities on the same hidden states, in nats
    tolerance: float  # the largest gap that is exact
    change: float  # the largest change of a log-probability of the reloaded model, in nats, with the model's rounding
    rounding: float  # the change that rounding explains
    dtype: str
    has_tokenizer: bool

    @property
    def is_exact(self) -> bool:
        return self.gap <= self.tolerance and self.change <= self.rounding


def convert(
    model: str | Path,
    folder: Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_size: str = "50GB",
    overwrite: bool = False,
    **head_options: Any,
) -> Conversion:
    """Converts a model, saves it with tokenizer and generation config, reloads it and compares the predictions.

    Args:
        model: folder or Hub id of a causal LM.
        folder: where the checkpoint goes.
        head_options: options of `from_causal_lm`.
        dtype, device, revision, trust_remote_code: as in [`load_model`].
        max_shard_size: as in `save_pretrained`.
        overwrite: write into a folder that holds something already.

    Raises:
        OSError: there is no such model, or the folder cannot be written.
        ValueError: an option is unknown or out of range, the folder is not empty, or the model cannot be converted.
    """
    with before_work():
        check_folder(folder, model, overwrite)
        check_shard_size(max_shard_size)
        config = check_options(str(model), None, revision, dtype, device, trust_remote_code)
        refuse_mixture(config, repr(str(model)))
        refuse_remote_code(type(config), repr(str(model)))
        check_head_options(head_options, config)
    tokenizer = find_tokenizer(model, revision, trust_remote_code)

    softmax = load_model(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokens = probe_tokens(softmax)
    logits = probe(softmax, tokens)
    num_softmax_parameters = softmax.num_parameters()
    projection: Any = softmax.get_output_embeddings()
    mixture = MoSForCausalLM.from_causal_lm(softmax, **head_options)
    print(describe_head(mixture), file=sys.stderr)
    gap = head_gap(mixture.eval(), projection, tokens)
    former = leftovers(folder) if overwrite else {}
    mixture.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    delete_unchanged(former)
    del softmax, mixture, projection

    reloaded = load_model(folder, device=device)
    change = (probe(reloaded, tokens) - logits.log_softmax(-1)).abs().max()
    config = reloaded.config
    return Conversion(
        folder=str(folder),
        num_mixtures=config.num_mixtures,
        shortlist_size=config.shortlist_size,
        num_parameters=reloaded.num_parameters(),
        num_new_parameters=reloaded.num_parameters() - num_softmax_parameters,
        gap=gap,
        tolerance=LARGEST_GAP,
        change=float(change),
        rounding=rounding(logits, reloaded.dtype),
        dtype=str(reloaded.dtype).removeprefix("torch."),
        has_tokenizer=tokenizer is not None,
    )


def check_folder(folder: Path, model: str | Path, overwrite: bool) -> None:
    """Raises a ValueError if saving would overwrite something, an OSError if it would fail."""
    if Path(model).is_dir() and folder.resolve() == Path(model).resolve():
        raise ValueError(f"folder: expected another than the model's own, given {str(folder)!r}")
    check_is_folder(folder, "folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        kind = "a checkpoint" if (folder / "config.json").is_file() else "something else than a checkpoint"
        raise ValueError(f"folder: expected an empty one, or --force, given {str(folder)!r}, which holds {kind}")
    parent = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise OSError(f"folder: expected one that can be written, given {str(folder)!r}: {parent} cannot be")


def check_shard_size(size: str) -> None:
    """Raises a ValueError for a size that `save_pretrained` would refuse, after the work."""
    if re.fullmatch(r"\d+(\.\d+)? ?(KB|MB|GB|TB)", size.strip().upper()) is None:
        raise ValueError(f"max_shard_size: expected a size such as 5GB, in KB, MB, GB or TB, given {size!r}")


def find_tokenizer(model: str | Path, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # a missing file raises any of these
        logger.warning(f"{model}: no tokenizer is saved, as none can be loaded: {str(error).splitlines()[0]}")
        return None


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """Random tokens, at most as many as the model has positions."""
    batch, length = PROBE_SHAPE
    positions = positions_of(model.config)
    embeddings: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(embeddings.weight.shape[0], (batch, min(length, positions or length)), generator=generator)


@torch.inference_mode()
def probe(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The logits, in fp32 on the CPU."""
    return model(input_ids=tokens.to(model.device)).logits.float().cpu()


@torch.inference_mode()
def head_gap(mixture: MoSForCausalLM, projection: nn.Linear, tokens: Tensor) -> float:
    """The largest difference between the log-probabilities of the mixture's head and of one softmax, in float64.

    NaN where one of them is. Both read the hidden states that the mixture's own head reads, so nothing is rounded but
    these.

    Args:
        projection: the vocabulary projection of the softmax model.
    """
    head: Any = mixture.mos_head
    hidden_states = mixture.head_inputs(input_ids=tokens.to(mixture.device)).flatten(0, -2)
    latents, prior_logits = head.latents(hidden_states), head.prior_logits(hidden_states)

    def wide_logits(hidden_states: Tensor, layer: nn.Linear) -> Tensor:
        weights, rows = layer.weight.split(ROWS_AT_A_TIME), hidden_states.double()
        logits = torch.cat([rows @ weight.double().T for weight in weights], dim=-1)
        return cap_logits(logits if layer.bias is None else logits + layer.bias.double(), head.softcap)

    gaps = []
    for i in range(0, hidden_states.shape[0], TOKENS_AT_A_TIME):
        part = slice(i, i + TOKENS_AT_A_TIME)
        mixed = mix_log_probs(wide_logits(latents[part], head), prior_logits[part].double())
        softmax = wide_logits(hidden_states[part], projection).log_softmax(-1)
        gaps.append((mixed - softmax).abs().max())
    return float(torch.stack(gaps).max())


def rounding(logits: Tensor, dtype: torch.dtype) -> float:
    """The error of the roundings in a forward pass, in nats."""
    return max(1e-5, 64 * torch.finfo(dtype).eps * float(logits.abs().max()))
