"""A stream of `datasets` through the Trainer."""

import json
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset, load_dataset
from helpers import random_tokens, tiny_mos
from transformers import Trainer, TrainingArguments


def trained(data: object, folder: Path, **options: object) -> tuple[list[float], torch.Tensor, dict[str, float]]:
    model = tiny_mos()
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=2,
        dataloader_pin_memory=False,
        learning_rate=1e-2,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, model.lm_head.prior.weight.detach(), trainer.evaluate()


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(8).tolist()]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def stream(path: Path) -> IterableDataset:
    return load_dataset("json", data_files=str(path), split="train", streaming=True, cache_dir=str(path.parent))


def test_a_stream_trains_like_a_list(rows_file: Path, tmp_path: Path) -> None:
    data = stream(rows_file)
    assert isinstance(data, IterableDataset)
    losses, prior, metrics = trained(data, tmp_path)
    # `datasets` in memory, in the order of the stream
    whole = load_dataset("json", data_files=str(rows_file), split="train", cache_dir=str(tmp_path))
    expected_losses, expected_prior, expected_metrics = trained(whole, tmp_path, train_sampling_strategy="sequential")
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert metrics["eval_loss"] < losses[0]
    assert prior.equal(expected_prior)
    assert metrics["eval_loss"] == pytest.approx(expected_metrics["eval_loss"], abs=1e-5)


def test_a_stream_can_be_mapped_and_shuffled(rows_file: Path, tmp_path: Path) -> None:
    data = (
        stream(rows_file).map(lambda row: {"labels": [-100, -100, *row["labels"][2:]]}).shuffle(seed=0, buffer_size=4)
    )
    losses, _, metrics = trained(data.repeat(2), tmp_path)
    assert len(losses) == 4
    assert metrics["eval_loss"] < losses[0]
