"""Trains one backbone on one text by one recipe, with different heads. Each training runs once; its result is kept."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus
from cost import operations, seconds_in_turn
from models import SOFTMAX, Head, Size, new_softmax_model, with_head
from results import Results, digest
from search import best_rate
from text import Text
from torch import Tensor
from training import Recipe, fit
from transformers import AutoModelForCausalLM

from hf_mos import MoSForCausalLM

FIT_FILE = "fit.json"  # in a checkpoint's folder, the result of its training


@dataclass(frozen=True)
class Experiment:
    text: Text | Corpus
    size: Size
    recipe: Recipe
    results: Results
    checkpoint: Path | None = None  # what each training starts from; `None`: random weights

    def with_size(self, hidden_size: int) -> "Experiment":
        return replace(self, size=replace(self.size, hidden_size=hidden_size))

    def with_recipe(self, **changes: Any) -> "Experiment":
        return replace(self, recipe=replace(self.recipe, **changes))

    def model(self, head: Head, seed: int = 0) -> MoSForCausalLM:
        if self.checkpoint is None:
            backbone = new_softmax_model(self.size, self.text.vocab_size, self.text.train.shape[1], seed)
        else:
            backbone = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
        return with_head(backbone, head, seed)

    def settings(self, head: Head, seed: int) -> dict[str, Any]:
        return {
            **self.text.settings,
            "size": self.size.settings,
            "checkpoint": self.checkpoint.name if self.checkpoint else None,
            "head": head.settings,
            "recipe": self.recipe.settings,
            "seed": seed,
        }

    def train(self, head: Head, seed: int) -> dict[str, Any]:
        """The result of `fit`. A small model of seed 0 is saved beside the results, named by its settings."""
        settings = self.settings(head, seed)

        def fit_and_save() -> dict[str, Any]:
            model = self.model(head, seed)
            name = f"{head.name}, hidden size {self.size.hidden_size}, seed {seed}"
            result = fit(model, self.text, self.recipe, seed, name, self.results.unfinished(settings))
            if seed == 0 and head.kind == "mixture" and self.text.tokenizer is not None:
                folder = self.results.path.parent / "models" / folder_name(head.name, settings)
                model.save_pretrained(folder)
                self.text.tokenizer.save_pretrained(folder)
            return result

        return self.results.run(settings, fit_and_save)

    def kept(self, head: Head, seed: int) -> dict[str, Any] | None:
        """The result of `train` with these arguments, if it has run."""
        return self.results.find(self.settings(head, seed))

    def from_checkpoint(self) -> "Experiment":
        """The experiment from a softmax model, which this recipe trains once and keeps beside the results."""
        seed = 0
        settings = self.settings(SOFTMAX, seed)
        folder = self.results.path.parent / "models" / folder_name("checkpoint", settings)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            backbone = new_softmax_model(self.size, self.text.vocab_size, self.text.train.shape[1], seed)
            model, unfinished = with_head(backbone, SOFTMAX, seed), self.results.unfinished(settings)
            result = fit(model, self.text, self.recipe, seed, "the checkpoint", unfinished)
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                staged = Path(work, "checkpoint")
                backbone.save_pretrained(staged)
                Path(staged, FIT_FILE).write_text(json.dumps(result), encoding="utf-8")
                staged.rename(folder)
        return replace(self, checkpoint=folder)

    def checkpoint_result(self) -> dict[str, Any]:
        """The result of `fit` for the checkpoint."""
        assert self.checkpoint is not None
        saved = self.checkpoint / FIT_FILE
        return self.results.run({"checkpoint": saved.parent.name}, lambda: json.loads(saved.read_text("utf-8")))

    def tuned(self, head: Head, rates: Sequence[dict[str, float]]) -> "Experiment":
        """The experiment with the best learning rates by the runs of seed 0; a single rate needs no run."""
        return self.with_recipe(**best_rate(rates, lambda rate: self.with_recipe(**rate).train(head, 0)["valid_nats"]))

    @property
    def batch(self) -> Tensor:
        return self.text.train[: self.recipe.batch_size]

    def operations(self, head: Head) -> float:
        """Multiplications and additions of a training step, per token."""
        return operations(self.model(head), self.batch, self.recipe)

    def widened(self, head: Head, budget: float) -> "Experiment":
        """The experiment with the smallest backbone that spends at least `budget` operations per token."""
        wider = self
        while wider.operations(head) < budget:
            wider = wider.with_size(wider.size.hidden_size + 2 * self.size.num_heads)
        return wider

    def seconds(self, configurations: "Configurations", rounds: int) -> dict[str, float]:
        """The seconds of a training step per token, measured once, in turn."""
        settings = {
            **self.text.settings,
            "seconds": {name: [other.size.settings, head.settings] for name, (other, head) in configurations.items()},
            "batch_size": self.recipe.batch_size,
            "train_backbone": self.recipe.train_backbone,
            "rounds": rounds,
        }
        makers = {name: partial(other.model, head) for name, (other, head) in configurations.items()}
        return self.results.run(settings, lambda: seconds_in_turn(makers, self.batch, self.recipe, rounds))


Configurations = dict[str, tuple[Experiment, Head]]  # by the name in a table


def train_all(found: Configurations, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """The results of each configuration. Runs seed after seed, so that an interrupted run has compared whole seeds."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
    for seed in range(seeds):
        for name, (experiment, head) in found.items():
            runs[name].append(experiment.train(head, seed))
    return runs


def folder_name(name: str, settings: dict[str, Any]) -> str:
    """A name that is unique to the settings."""
    return f"{name.replace(' ', '-').replace('=', '')}-{digest(settings)}"
