"""Exports the softmax model inside a mixture, which tools that know no mixture can read.

```python
exported = export("gpt2-mos", Path("gpt2-softmax"))
print(exported.change)  # the largest change of a log-probability, in nats
```
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..remote_code.mos_checkpoint import replace_checkpoint
from .convert import (
    LARGEST_GAP,
    check_folder,
    check_shard_size,
    find_tokenizer,
    head_gap,
    probe,
    probe_tokens,
    rounding,
)
from .exit_codes import before_work
from .loading import check_options, is_mixture, load_model
from .places import delete_unchanged, leftovers

CODE_FILES = ("configuration_mos.py", "modeling_mos.py", "mos_*.py")  # of a mixture that was in the folder


@dataclass(frozen=True)
class Export:
    """The result of an export, and the change of the predictions."""

    folder: str
    model_class: str
    num_parameters: int
    gap: float  # the largest difference of the two heads on the same hidden states, in nats, in float64
    change: float  # the largest difference of a log-probability from the mixture's, in nats
    reload_change: float  # the same of the reloaded model from the model that was saved
    rounding: float  # the change that rounding explains
    dtype: str
    has_tokenizer: bool

    @property
    def is_same(self) -> bool:
        """Whether nothing is lost, as in a mixture that is not trained. The change is by rounding then."""
        return self.gap <= LARGEST_GAP

    @property
    def is_written(self) -> bool:
        return self.reload_change <= self.rounding


def export(
    mixture: str | Path,
    folder: Path,
    *,
    dtype: str = "auto",
    device: str | None = "cpu",
    revision: str | None = None,
    max_shard_size: str = "50GB",
    overwrite: bool = False,
) -> Export:
    """Saves `MoSForCausalLM.to_softmax` of a mixture with its tokenizer, reloads it and compares the predictions.

    Args:
        mixture: folder or Hub id of a mixture.
        folder: where the checkpoint goes.
        dtype, device, revision: as in [`load_model`].
        max_shard_size: as in `save_pretrained`.
        overwrite: write into a folder that holds something already.

    Raises:
        OSError: there is no such model, or the folder cannot be written.
        ValueError: an option is refused, the folder is not empty, or the model is no mixture.
    """
    with before_work():
        check_folder(folder, mixture, overwrite)
        check_shard_size(max_shard_size)
        config = check_options(str(mixture), None, revision, dtype, device, trust_remote_code=False)
        if not is_mixture(config):
            raise ValueError(f"model: expected a mixture of softmaxes, given {str(mixture)!r}, a {config.model_type}")
    tokenizer = find_tokenizer(mixture, revision, trust_remote_code=False)

    model: Any = load_model(mixture, revision=revision, dtype=dtype, device=device)
    softmax = model.to_softmax()
    tokens = probe_tokens(softmax)
    expected, logits = probe(model, tokens).log_softmax(-1), probe(softmax, tokens)
    gap = head_gap(model, softmax.get_output_embeddings(), tokens)
    former = leftovers(folder, more=CODE_FILES) if overwrite else {}
    replace_checkpoint(folder, None, partial(softmax.save_pretrained, max_shard_size=max_shard_size))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    delete_unchanged(former)
    del model, softmax

    reloaded = load_model(folder, device=device)
    log_probs = logits.log_softmax(-1)
    return Export(
        folder=str(folder),
        model_class=type(reloaded).__name__,
        num_parameters=reloaded.num_parameters(),
        gap=gap,
        change=float((log_probs - expected).abs().max()),
        reload_change=float((probe(reloaded, tokens).log_softmax(-1) - log_probs).abs().max()),
        rounding=rounding(logits, reloaded.dtype),
        dtype=str(reloaded.dtype).removeprefix("torch."),
        has_tokenizer=tokenizer is not None,
    )
