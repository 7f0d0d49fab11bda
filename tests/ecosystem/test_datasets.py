"""Checks that the Trainer trains a mixture on a stream of `datasets`."""

import json
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset, load_dataset
from helpers import VOCAB_SIZE, logged_losses, random_tokens, tiny_causal_lm, tiny_mos
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_mos.tools.train import train
from hf_mos.tools.train_options import parse_options


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
    losses = logged_losses(trainer)
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


def test_the_training_script_streams(tmp_path: Path) -> None:
    """The first steps on a stream are those on the whole file, in the order of its lines."""
    text = "\n".join(" ".join(f"w{token}" for token in row) for row in random_tokens(40, 16).tolist())
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(tmp_path / "model")
    tiny_causal_lm().save_pretrained(tmp_path / "model")
    losses = {}
    for streaming in (True, False):
        output = tmp_path / f"streaming-{streaming}"
        options = {
            "model": tmp_path / "model",
            "num-mixtures": 3,
            "train-file": tmp_path / "text.txt",
            "validation-file": tmp_path / "text.txt",
            "block-size": 8,
            "streaming": streaming,
            "max-steps": 6,
            "output-dir": output,
            "use-cpu": True,
            "report-to": "none",
            "disable-tqdm": True,
            "logging-steps": 1,
            "learning-rate": 1e-3,
            "train-sampling-strategy": "sequential",
        }
        train(*parse_options([f"--{name}={value}" for name, value in options.items()]))
        state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
        losses[streaming] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert json.loads((output / "eval_results.json").read_text(encoding="utf-8"))["perplexity"] > 1
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
    assert len(losses[True]) == 6


def test_a_stream_needs_a_number_of_steps(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w3 w4", encoding="utf-8")
    arguments = ["--model=x", f"--train-file={tmp_path / 'text.txt'}", "--streaming", f"--output-dir={tmp_path}"]
    with pytest.raises(ValueError, match="--max-steps: expected a number of steps with --streaming"):
        train(*parse_options([*arguments, "--use-cpu", "--report-to=none"]))
