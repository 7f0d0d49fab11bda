"""Checks the callbacks on two processes: both stop at the same step, and the logged numbers cover all tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import WORLD_SIZE, run_on_two
from test_fsdp2 import load_sharded, shard
from training_steps import make_model, run_trainer, training_rows
from transformers import TrainerCallback

from hf_mos.training.callbacks import MixtureUsage, StopOnNonFiniteLoss, whole_head


class Poison(TrainerCallback):
    """From the third step on, the loss of one rank is not a number."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model, self.state = model, state
        model.register_forward_hook(self.spoil)

    def spoil(self, model: Any, inputs: Any, outputs: Any) -> None:
        if self.state.global_step == 2 and torch.distributed.get_rank() == 1:
            outputs.loss = outputs.loss * float("nan")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = [parameter.detach().clone() for parameter in self.model.parameters()]


def stop_together(folder: str) -> None:
    poison = Poison()
    with pytest.raises(FloatingPointError, match="the loss of step 3 is not finite"):
        run_trainer(folder, "llama", WORLD_SIZE, callbacks=[poison, StopOnNonFiniteLoss()])
    for now, before in zip(poison.model.parameters(), poison.weights, strict=True):
        assert torch.equal(now, before)


def gather_heads(folder: str) -> None:
    """A sharded head is looked at whole."""
    for name in ("llama-tied", "llama"):
        plain = make_model(name)
        sharded = {"torch": shard(make_model(name)), "transformers": load_sharded(Path(folder, name), name)}
        for model in sharded.values():
            head = whole_head(model.lm_head)
            for key, parameter in head.named_parameters():
                assert torch.equal(parameter, plain.lm_head.get_parameter(key)), key
        assert whole_head(plain.lm_head) is plain.lm_head


def log_usage(folder: str | Path, world_size: int) -> list[dict[str, float]]:
    """Of batches in which the second process has no label that counts."""
    rows = training_rows()
    for i, row in enumerate(rows):
        if i % 4 >= 2:
            row["labels"] = torch.full_like(row["labels"], -100)
    usage = MixtureUsage(components=True, max_tokens=1000)
    trainer = run_trainer(folder, "llama", world_size, usage=usage, rows=rows, gradient_accumulation_steps=1)
    names = ("mixture_entropy", "smallest_mixture_weight", "responsibility_0", "divergence_0_1")
    return [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]


def run_callbacks(folder: str) -> None:
    stop_together(folder)
    gather_heads(folder)
    Path(folder, f"{torch.distributed.get_rank()}.json").write_text(json.dumps(log_usage(folder, WORLD_SIZE)))


def test_all_stop_before_the_step_and_usage_is_of_the_tokens_of_all(tmp_path: Path) -> None:
    run_on_two(run_callbacks, tmp_path)
    expected = log_usage(tmp_path, world_size=1)
    for rank in range(WORLD_SIZE):
        logged = json.loads((tmp_path / f"{rank}.json").read_text())
        assert logged == [pytest.approx(entry, abs=1e-5) for entry in expected]
