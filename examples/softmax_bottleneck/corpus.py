"""The text of a pretrained model: its tokens, or their hidden states. `text.py` has that of the small models.

Both are read by `fit` of `training.py`. Nats are those of `hf-mos evaluate`: each token of the validation text once,
with its context.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from text import Source
from torch import Tensor
from training import shuffled
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mos import MoSForCausalLM
from hf_mos.tools.evaluate import Window, collate, prefix_of, target_nll, tokenize, windows_of
from hf_mos.training.hidden_states import HiddenStateRows, keep_hidden_states, sum_nats

BLOCK_SIZE, WINDOW, STRIDE = 256, 512, 256  # tokens


@dataclass(frozen=True)
class Corpus:
    """The tokens of a text, in blocks to train on and in windows that count each token once."""

    name: str
    blocks: Tensor  # (blocks, BLOCK_SIZE)
    windows: list[Window]
    tokenizer = None  # a pretrained model has one; no copy of it is saved
    measured = ("valid",)

    @classmethod
    def read(
        cls, source: Source, tokenizer: PreTrainedTokenizerBase, train_tokens: int, valid_tokens: int
    ) -> "Corpus":
        texts = source.texts()
        joiner = "\n" if source.files() else "\n\n"
        tokens = {
            split: torch.tensor(prefix_of(tokenizer) + tokenize(tokenizer, joiner.join(texts[split])))
            for split in ("train", "valid")
        }
        count = min(len(tokens["train"]), train_tokens) // BLOCK_SIZE
        valid = tokens["valid"][: valid_tokens + 1].tolist()
        blocks = tokens["train"][: count * BLOCK_SIZE].view(count, BLOCK_SIZE)
        return cls(source.name, blocks, [*windows_of(valid, [True] * len(valid), WINDOW, STRIDE)])

    @cached_property
    def num_targets(self) -> int:
        return sum(len(window.targets) for window in self.windows)

    @property
    def settings(self) -> dict[str, Any]:
        return {"text": self.name, "blocks": list(self.blocks.shape), "targets": self.num_targets}

    # The tokens, as `fit` reads them.

    def batches(self, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        for chosen in shuffled(len(self.blocks), batch_size, seed):
            yield {"input_ids": self.blocks[chosen], "labels": self.blocks[chosen]}

    def nats(self, model: PreTrainedModel, split: str) -> float:
        model.eval()
        plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # LoRA stays in its layers
        return sum(float(target_nll(plain, **collate([w])).sum()) for w in self.windows) / self.num_targets


@dataclass(frozen=True)
class KeptCorpus:
    """The same with the hidden states of the tokens in their place."""

    train: HiddenStateRows
    valid: HiddenStateRows
    num_targets: int
    measured = ("valid",)

    @classmethod
    def keep(cls, corpus: Corpus, model: MoSForCausalLM, folder: Path) -> "KeptCorpus":
        rows = {
            "train": [{"input_ids": block, "labels": block} for block in corpus.blocks],
            "valid": [{"input_ids": w.inputs.long(), "labels": w.aligned_targets} for w in corpus.windows],
        }
        kept = {
            split: keep_hidden_states(model, rows[split], folder / split, track=progress(f"hidden states: {split}"))
            for split in rows
        }
        return cls(kept["train"], kept["valid"], corpus.num_targets)

    def batches(self, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        for chosen in shuffled(len(self.train), batch_size, seed):
            rows = [self.train[index] for index in chosen.tolist()]
            yield {name: torch.stack([row[name] for row in rows]) for name in ("hidden_states", "labels")}

    def nats(self, model: PreTrainedModel, split: str) -> float:
        return sum_nats(model, self.valid) / self.num_targets


def progress(title: str) -> Any:
    return lambda batches: track(batches, title, console=Console(stderr=True), transient=True)
