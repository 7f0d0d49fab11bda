"""Checks training of the head alone: it is as with a frozen backbone that runs, and refused where it would not be."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_causal_lm, tiny_mos
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_mos import MoSForCausalLM
from hf_mos.training.hidden_states import (
    DATA_FILE,
    PROGRESS_FILE,
    bytes_of,
    freeze_backbone,
    keep_hidden_states,
)

NAMES = ["llama", "llama-tied", "gpt2", "mamba", "gemma2", "mixtral"]


def rows_of(count: int = 10, lengths: tuple[int, ...] = (12,)) -> list[dict[str, list[int]]]:
    rows = [random_tokens(1, lengths[seed % len(lengths)], seed)[0].tolist() for seed in range(count)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def trained(model: MoSForCausalLM, rows: Any, folder: Path, steps: int = 6) -> tuple[list[float], dict[str, Tensor]]:
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, seed=3,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: weight.detach() for name, weight in model.mos_head.named_parameters()}


def backbone_of(model: MoSForCausalLM) -> list[Tensor]:
    """The weights before the head, as the softmax model has them."""
    return [*model.base_model.parameters()]


@pytest.mark.parametrize("train_decoder", [None, False])
@pytest.mark.parametrize("name", NAMES)
def test_trains_as_with_a_frozen_backbone_that_runs(name: str, train_decoder: bool | None, tmp_path: Path) -> None:
    model, rows = tiny_mos(name), rows_of()
    freeze_backbone(model, train_decoder)
    twin = copy.deepcopy(model)
    kept = keep_hidden_states(twin, rows, tmp_path / "states")
    expected_losses, expected = trained(model, rows, tmp_path)
    losses, weights = trained(twin, kept, tmp_path)
    assert losses == pytest.approx(expected_losses, abs=1e-6)
    for weight_name in expected:
        torch.testing.assert_close(weights[weight_name], expected[weight_name], atol=1e-6, rtol=1e-5)
    start = tiny_mos(name)
    for same in (model, twin):
        assert all(torch.equal(*pair) for pair in zip(backbone_of(same), backbone_of(start), strict=True))
    assert not torch.equal(model.lm_head.shift.weight, start.lm_head.shift.weight)
    assert not torch.equal(model.lm_head.prior.weight, start.lm_head.prior.weight)
    moved = not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert moved == (train_decoder is None and not model.config.tie_word_embeddings)


def test_the_result_is_one_checkpoint(tmp_path: Path) -> None:
    model, rows, tokens = tiny_mos(), rows_of(), random_tokens()
    freeze_backbone(model)
    trained(model, keep_hidden_states(model, rows, tmp_path / "states"), tmp_path)
    model.eval().save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
        states = model.head_inputs(input_ids=tokens)
        assert torch.equal(model(hidden_states=states).logits, model(input_ids=tokens).logits)
        losses = [model(labels=tokens, **inputs).loss for inputs in ({"hidden_states": states}, {"input_ids": tokens})]
    torch.testing.assert_close(*losses)
    with pytest.raises(ValueError, match="hidden_states: expected no input_ids"):
        model(input_ids=tokens, hidden_states=states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_holds_what_the_head_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    model, rows = tiny_mos().to(dtype), rows_of(7, lengths=(12, 12, 5))
    freeze_backbone(model)
    kept = keep_hidden_states(model, rows, tmp_path, batch_size=2)
    assert (tmp_path / DATA_FILE).stat().st_size == bytes_of(model, rows)
    assert len(kept) == 7
    assert model.training is False
    for row, given in zip(rows, kept, strict=True):
        with torch.no_grad():
            expected = model.head_inputs(input_ids=torch.tensor([row["input_ids"]]))[0]
        torch.testing.assert_close(
            given["hidden_states"], expected, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2
        )
        assert given["labels"].tolist() == row["labels"]


class Counted:
    """A progress bar that stops after some batches."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.stop_after, self.batches = stop_after, 0

    def __call__(self, batches: Any) -> Any:
        for batch in batches:
            if self.batches == self.stop_after:
                raise KeyboardInterrupt
            yield batch
            self.batches += 1


def test_an_interrupted_run_is_taken_up(tmp_path: Path) -> None:
    model, rows = tiny_mos(), rows_of(10)
    freeze_backbone(model)
    expected = keep_hidden_states(model, rows, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        keep_hidden_states(model, rows, tmp_path / "part", batch_size=2, track=Counted(3))
    assert json.loads((tmp_path / "part" / PROGRESS_FILE).read_text())["rows"] == 6
    rest = Counted()
    kept = keep_hidden_states(model, rows, tmp_path / "part", batch_size=2, track=rest)
    assert rest.batches == 2
    torch.testing.assert_close(kept.states, expected.states)
    again = Counted()
    assert torch.equal(keep_hidden_states(model, rows, tmp_path / "part", track=again).states, kept.states)
    assert again.batches == 0


@pytest.mark.parametrize("change", ["rows", "weights", "file"])
def test_hidden_states_of_something_else_are_made_anew(change: str, tmp_path: Path) -> None:
    model, rows = tiny_mos(), rows_of(4)
    freeze_backbone(model)
    keep_hidden_states(model, rows, tmp_path)
    if change == "rows":
        rows = rows_of(5)
    elif change == "weights":
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
    else:
        (tmp_path / PROGRESS_FILE).write_text("{")
    counted = Counted()
    kept = keep_hidden_states(model, rows, tmp_path, batch_size=1, track=counted)
    assert counted.batches == len(rows)
    with torch.no_grad():
        expected = model.head_inputs(input_ids=torch.tensor([rows[0]["input_ids"]]))[0]
    torch.testing.assert_close(kept[0]["hidden_states"], expected)


def test_heads_of_another_kind_use_the_same_hidden_states(tmp_path: Path) -> None:
    rows, counted = rows_of(4), Counted()
    for options in ({"num_mixtures": 2}, {"num_mixtures": 4, "shortlist_size": None, "latent_scale": 0.5}):
        model = tiny_mos(**options)
        freeze_backbone(model)
        keep_hidden_states(model, rows, tmp_path, batch_size=1, track=counted)
    assert counted.batches == len(rows)


def with_adapter(model: MoSForCausalLM) -> None:
    layer: Any = model.get_submodule("model.layers.0.self_attn")
    layer.q_proj.base_layer = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "train_decoder", "error"),
    [
        (lambda: tiny_mos("llama-tied"), True, "expected a decoder of its own to train"),
        (
            lambda: MoSForCausalLM.from_causal_lm(tiny_causal_lm("llama", attention_dropout=0.1)),
            None,
            "attention_dropout=0.1",
        ),
        (lambda: with_dropout_module(tiny_mos("gpt2")), None, "drop=0.2"),
    ],
)
def test_untrue_hidden_states_are_refused(make: Any, train_decoder: bool | None, error: str) -> None:
    with pytest.raises(ValueError, match=f"freeze_backbone: .*{error}"):
        freeze_backbone(make(), train_decoder)


def with_dropout_module(model: MoSForCausalLM) -> MoSForCausalLM:
    model.get_submodule("transformer.drop").p = 0.2  # type: ignore[assignment]
    return model


def test_an_adapter_a_router_loss_and_a_trained_backbone_are_refused(tmp_path: Path) -> None:
    model = tiny_mos()
    with_adapter(model)
    with pytest.raises(ValueError, match=r"expected a backbone without an adapter, given one on .*q_proj"):
        freeze_backbone(model)
    model = tiny_mos("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="expected output_router_logits=False"):
        freeze_backbone(model)
    with pytest.raises(ValueError, match="expected a frozen backbone, given one that trains"):
        keep_hidden_states(tiny_mos(), rows_of(1), tmp_path)


def test_a_full_disk_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mos()
    freeze_backbone(model)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(ValueError, match="expected 1,536 bytes of free space, given 100"):
        keep_hidden_states(model, rows_of(1), tmp_path)
    assert not (tmp_path / DATA_FILE).exists()
