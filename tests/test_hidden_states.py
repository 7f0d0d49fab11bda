"""Checks training of the head alone: it is as with a frozen backbone that runs, and refused where it would not be."""

import copy
import errno
import multiprocessing
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import cpu_offload
from cases import cases
from helpers import ATTENTION, COMMON, logged_losses, random_tokens, tiny_causal_lm, tiny_mos
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_mos import MoSForCausalLM
from hf_mos.training.hidden_states import bytes_of, freeze_backbone, keep_hidden_states, sum_nats

NAMES = ["llama", "llama-tied", "gpt2", "mamba", "gemma2", "mixtral"]


def rows_of(count: int = 10, lengths: tuple[int, ...] = (12,)) -> list[dict[str, list[int]]]:
    rows = [random_tokens(1, lengths[seed % len(lengths)], seed)[0].tolist() for seed in range(count)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def files_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != ".lock")


def file_in(folder: Path, suffix: str = ".safetensors") -> Path:
    """The one file with hidden states of a folder."""
    (name,) = files_in(folder)
    assert name.endswith(suffix)
    return folder / name


def trained(model: MoSForCausalLM, rows: Any, folder: Path, steps: int = 6) -> tuple[list[float], dict[str, Tensor]]:
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, seed=3,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = logged_losses(trainer)
    return losses, {name: weight.detach() for name, weight in model.mos_head.named_parameters()}


def backbone_of(model: MoSForCausalLM) -> list[Tensor]:
    """The weights before the head, as the softmax model has them."""
    return [*model.base_model.parameters()]


@pytest.mark.parametrize(
    ("name", "train_decoder"),
    cases(NAMES, [None, False], quick=[("llama", None), ("llama", False), ("llama-tied", None)]),
)
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
    assert 0 <= file_in(tmp_path).stat().st_size - bytes_of(model, rows) <= 4096
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
    assert file_in(tmp_path / "part", ".part").stat().st_size >= bytes_of(model, rows[:6])
    rest = Counted()
    kept = keep_hidden_states(model, rows, tmp_path / "part", batch_size=2, track=rest)
    assert rest.batches == 2
    torch.testing.assert_close(kept.states, expected.states)
    again = Counted()
    assert torch.equal(keep_hidden_states(model, rows, tmp_path / "part", track=again).states, kept.states)
    assert again.batches == 0


def frozen(*arguments: Any, **options: Any) -> MoSForCausalLM:
    model = tiny_mos(*arguments, **options)
    freeze_backbone(model)
    return model


@torch.no_grad()
def assert_true(kept: Any, model: MoSForCausalLM, rows: Any) -> None:
    """The rows are what the head would read, and what the loss would be of."""
    assert len(kept) == len(rows)
    for row, given in zip(rows, kept, strict=True):
        inputs = {name: torch.as_tensor(value).unsqueeze(0) for name, value in row.items() if value is not None}
        labels = inputs.pop("labels")
        torch.testing.assert_close(
            given["hidden_states"], model.head_inputs(**inputs, use_cache=False)[0], atol=1e-4, rtol=1e-4
        )
        assert given["labels"].tolist() == labels[0].tolist()


def assert_made_anew(model: MoSForCausalLM, rows: Any, folder: Path) -> None:
    counted = Counted()
    assert_true(keep_hidden_states(model, rows, folder, batch_size=1, track=counted), model, rows)
    assert counted.batches == len(rows)


def assert_read(model: MoSForCausalLM, rows: Any, folder: Path) -> None:
    counted = Counted()
    assert_true(keep_hidden_states(model, rows, folder, track=counted), model, rows)
    assert counted.batches == 0


def exchange(weight: Tensor, dim: int) -> None:
    weight.copy_(weight.roll(1, dim))


def layer(model: Any) -> Any:
    return model.model.layers[0]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight": lambda model: layer(model).mlp.up_proj.weight.mul_(1.1),
    "one number of a weight": lambda model: layer(model).mlp.up_proj.weight[3, 4].add_(1e-2),
    "rows exchanged": lambda model: exchange(layer(model).mlp.up_proj.weight, 0),
    "columns exchanged": lambda model: exchange(layer(model).self_attn.q_proj.weight, 1),
    "layers exchanged": lambda model: model.model.layers.append(model.model.layers.pop(0)),
    "the embedding": lambda model: exchange(model.get_input_embeddings().weight, 0),
    "a buffer that is not saved": lambda model: exchange(model.model.rotary_emb.inv_freq, 0),
    "a number": lambda model: setattr(layer(model).self_attn, "scaling", 0.7),
    "an activation": lambda model: setattr(layer(model).mlp, "act_fn", nn.Tanh()),
    "a hook": lambda model: layer(model).register_forward_pre_hook(lambda _, given: (given[0] * 0.5, *given[1:])),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_backbone_that_changed_runs_again(change: str, tmp_path: Path) -> None:
    model, rows = frozen("llama").to(torch.bfloat16), rows_of(2)  # sums of bf16 are exact in any order
    before = keep_hidden_states(model, rows, tmp_path)
    CHANGES[change](model)
    assert not torch.allclose(before[0]["hidden_states"], model.head_inputs(torch.tensor([rows[0]["input_ids"]]))[0])
    assert_made_anew(model, rows, tmp_path)


@torch.no_grad()
def test_a_router_whose_correction_bias_changed_runs_again(tmp_path: Path) -> None:
    config = Glm4MoeConfig(
        **COMMON, **ATTENTION, head_dim=8, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=1,
        first_k_dense_replace=0, n_group=1, topk_group=1,
    )  # fmt: skip
    model = MoSForCausalLM.from_causal_lm(Glm4MoeForCausalLM(config).eval())
    freeze_backbone(model)
    rows = rows_of(2)
    keep_hidden_states(model, rows, tmp_path)
    layer(model).mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 5.0, 0.0, -5.0]))
    assert_made_anew(model, rows, tmp_path)


def test_a_config_and_a_precision_that_changed_run_again(tmp_path: Path) -> None:
    model, rows = frozen("llama"), rows_of(2)
    assert_made_anew(model, rows, tmp_path)
    model.config.use_cache = not model.config.use_cache  # as the Trainer does
    assert_read(model, rows, tmp_path)
    model.config.rms_norm_eps = 0.5
    assert_made_anew(model, rows, tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        counted = Counted()
        with torch.autocast("cpu", dtype):
            keep_hidden_states(model, rows, tmp_path, batch_size=1, track=counted)
            keep_hidden_states(model, rows, tmp_path, batch_size=1, track=counted)
        assert counted.batches == len(rows)
    assert_read(model, rows, tmp_path)
    model.to(torch.float64)
    assert_made_anew(model, rows, tmp_path)


def test_rows_that_changed_run_again_and_sets_of_rows_share_a_folder(tmp_path: Path) -> None:
    model, rows = frozen(), rows_of(4)
    first = keep_hidden_states(model, rows, tmp_path)
    one_token, other_lengths = copy.deepcopy(rows), rows_of(3, lengths=(12, 5, 7))
    one_token[2]["input_ids"][5] += 1
    for others in (rows[:3], rows[::-1], rows_of(5), one_token, other_lengths):
        assert_made_anew(model, others, tmp_path)
    assert_true(first, model, rows)
    assert_read(model, rows, tmp_path)
    new_labels = [row | {"labels": row["input_ids"]} for row in rows]
    assert_read(model, new_labels, tmp_path)
    assert_read(model, datasets.Dataset.from_list(rows), tmp_path)
    assert_read(model, datasets.Dataset.from_list(rows).with_format("numpy"), tmp_path)
    assert_read(model, [{name: torch.tensor(value) for name, value in row.items()} for row in rows], tmp_path)


def harm(file: Path, kind: str) -> None:
    size = file.stat().st_size
    if kind == "zeros":
        os.truncate(file, size - 1000)
        os.truncate(file, size)
    elif kind == "longer":
        os.truncate(file, size + 8)
    elif kind == "NaN":
        with file.open("r+b") as opened:
            opened.seek(size - 8)
            opened.write(b"\xff" * 8)
    elif kind == "other tensors":
        save_file({"hidden_states": torch.zeros(48, 32)}, file)
    elif kind == "text":
        file.write_text("{")
    else:
        os.truncate(file, {"cut": size // 2, "cut by a row": size - 12 * 32 * 4, "empty": 0}[kind])


@pytest.mark.parametrize("kind", ["cut", "cut by a row", "empty", "zeros", "longer", "NaN", "other tensors", "text"])
def test_a_file_that_was_harmed_is_made_anew(kind: str, tmp_path: Path) -> None:
    model, rows = frozen(), rows_of(4)
    keep_hidden_states(model, rows, tmp_path)
    for file in tmp_path.iterdir():
        if file.suffix in (".safetensors", ".bin"):
            harm(file, kind)
    assert_made_anew(model, rows, tmp_path)
    assert_read(model, rows, tmp_path)
    assert len(files_in(tmp_path)) == 1


@pytest.mark.parametrize("kind", ["cut", "zeros", "NaN", "text"])
def test_a_part_that_was_harmed_is_not_taken_up(kind: str, tmp_path: Path) -> None:
    model, rows = frozen(), rows_of(4)
    with pytest.raises(KeyboardInterrupt):
        keep_hidden_states(model, rows, tmp_path, batch_size=1, track=Counted(3))
    for file in tmp_path.iterdir():
        if file.suffix in (".part", ".bin"):
            harm(file, kind)
    assert_made_anew(model, rows, tmp_path)


def test_a_part_of_something_else_is_deleted(tmp_path: Path) -> None:
    model, rows = frozen(), rows_of(4)
    for others in (rows_of(5), rows_of(6), rows):
        with pytest.raises(KeyboardInterrupt):
            keep_hidden_states(model, others, tmp_path, batch_size=1, track=Counted(1))
    file_in(tmp_path, ".part")
    keep_hidden_states(model, rows, tmp_path)
    file_in(tmp_path, ".safetensors")


def test_a_folder_that_moved_or_holds_an_older_format_is_read_as_it_is(tmp_path: Path) -> None:
    model, rows = frozen(), rows_of(4)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/hidden_states.bin").write_bytes(bytes(bytes_of(model, rows)))
    (tmp_path / "old/progress.json").write_text('{"fingerprint": "0", "rows": 4}')
    assert_made_anew(model, rows, tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert_read(model, rows, tmp_path / "new")
    assert not (tmp_path / "old").exists()


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
    assert files_in(tmp_path) == []


def test_a_disk_that_fills_up_leaves_no_file_and_the_next_call_goes_on(tmp_path: Path) -> None:
    model, rows = frozen(), rows_of(8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(batches: Any) -> Iterator[range]:
        for batch in batches:
            if batch.start == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + bytes_of(model, rows[:5]) + 100, limits[1]))
            yield batch

    try:
        with pytest.raises(OSError, match="File too large") as error:
            keep_hidden_states(model, rows, tmp_path, batch_size=1, track=filling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    file_in(tmp_path, ".part")
    rest = Counted()
    assert_true(keep_hidden_states(model, rows, tmp_path, batch_size=1, track=rest), model, rows)
    assert rest.batches == 3
    file_in(tmp_path)


def test_a_finished_file_is_read_without_writing(tmp_path: Path) -> None:
    """As a folder may be read-only: not even a lock can be taken there."""
    model, rows = frozen(), rows_of(3)
    keep_hidden_states(model, rows, tmp_path)
    for file in tmp_path.iterdir():
        if file.name not in files_in(tmp_path):
            file.unlink()
    before = {file.name: file.stat().st_mtime_ns for file in [tmp_path, *tmp_path.iterdir()]}
    assert_read(model, rows, tmp_path)
    assert before == {file.name: file.stat().st_mtime_ns for file in [tmp_path, *tmp_path.iterdir()]}


MASKED = [
    {"input_ids": [0, 0, 5, 6, 7, 8], "labels": [-100, -100, 5, 6, 7, 8], "attention_mask": [0, 0, 1, 1, 1, 1]},
    {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [3, 4, 5, 6, 7, 8], "attention_mask": [1, 1, 1, 1, 1, 1]},
]
PACKED = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}]
TYPED = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "token_type_ids": [0, 0, 1, 1]}]


@pytest.mark.parametrize(
    ("name", "rows"), [("llama", MASKED), ("llama", PACKED), ("gpt2", TYPED), ("gpt2", MASKED + PACKED + TYPED)]
)
def test_the_backbone_gets_all_that_a_row_has(name: str, rows: Any, tmp_path: Path) -> None:
    model = frozen(name)
    plain = [{each: row[each] for each in ("input_ids", "labels")} for row in rows]
    keep_hidden_states(model, plain, tmp_path)
    assert_made_anew(model, rows, tmp_path)
    kept = keep_hidden_states(model, rows, tmp_path, batch_size=8)
    for row, given in zip(rows, kept, strict=True):
        inputs = {each: torch.tensor([value]) for each, value in row.items()}
        targets = torch.tensor([[*row["labels"][1:], -100]])
        with torch.no_grad():
            expected = model(**inputs, use_cache=False, num_items_in_batch=1).loss  # as under the Trainer
            loss = model(hidden_states=given["hidden_states"][None], shift_labels=targets, num_items_in_batch=1).loss
        torch.testing.assert_close(loss, expected)
    columns = dict.fromkeys(name for row in rows for name in row)  # a row of a Dataset has None where it has no value
    assert_read(model, datasets.Dataset.from_list([columns | row for row in rows]), tmp_path)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], "rows: expected a sequence of at least one row, given list"),
        (iter(rows_of(2)), "rows: expected a sequence of at least one row, given list_iterator"),
        ([*rows_of(1), {"input_ids": [3, 4]}], r"rows\[1\]: expected input_ids, labels and .*, given \['input_ids'\]"),
        ([{"labels": [3, 4]}], r"rows\[0\]: expected input_ids, labels"),
        ([{"input_ids": [3, 4], "labels": None}], r"rows\[0\]: expected input_ids, labels"),
        ([[3, 4, 5]], r"rows\[0\]: expected input_ids, labels .*list"),
        (
            [{"input_ids": [3, 4], "labels": [3, 4], "token_type_ids": [0, 0]}],
            r"what MoSLlamaForCausalLM.forward names, given .*'token_type_ids'",
        ),
        ([{"input_ids": [3, 4], "labels": [4]}], r"rows\[0\]: expected a token .*, given shapes \[2\] and \[1\]"),
        ([{"input_ids": [], "labels": []}], r"rows\[0\]: expected a token .*, given shapes \[0\] and \[0\]"),
        ([{"input_ids": [[3, 4]], "labels": [[3, 4]]}], r"given shapes \[1, 2\] and \[1, 2\]"),
    ],
)
def test_rows_that_cannot_be_kept_are_refused(rows: Any, error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        keep_hidden_states(frozen(), rows, tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_hidden_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model, rows = frozen(), rows_of(3)
    rows[1]["input_ids"][4] = 90
    with torch.no_grad():
        model.get_input_embeddings().weight[90, 0] = torch.nan
    with pytest.raises(ValueError, match=r"rows\[1\]: expected finite hidden states, given NaN or infinity"):
        keep_hidden_states(model, rows, tmp_path)
    assert not [name for name in files_in(tmp_path) if name.endswith(".safetensors")]


def test_weights_elsewhere_are_read_or_refused(tmp_path: Path) -> None:
    model, rows = frozen(), rows_of(2)
    cpu_offload(model)
    assert_made_anew(model, rows, tmp_path)
    assert_read(model, rows, tmp_path)
    assert layer(model).mlp.up_proj.weight.is_meta
    assert_read(frozen(), rows, tmp_path)
    changed = frozen()
    with torch.no_grad():
        exchange(layer(changed).mlp.up_proj.weight, 0)
    cpu_offload(changed)
    assert_made_anew(changed, rows, tmp_path)
    with pytest.raises(ValueError, match=r"expected weights that are whole and in memory, given model\.embed_tokens"):
        keep_hidden_states(frozen().to("meta"), rows, tmp_path)


def test_a_row_can_be_changed_without_the_file(tmp_path: Path) -> None:
    model, rows = frozen(), rows_of(2)
    kept = keep_hidden_states(model, rows, tmp_path)
    kept[0]["hidden_states"].zero_()
    assert_true(kept, model, rows)
    assert_read(model, rows, tmp_path)
    with pytest.raises(IndexError):
        kept[2]
    assert torch.equal(kept[-1]["hidden_states"], kept[1]["hidden_states"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_worker_processes_read_the_rows(tmp_path: Path) -> None:
    """A forked worker sends rows; one of another start method gets the dataset by this pickler, without the states."""
    model, rows = frozen(), rows_of(6)
    kept = keep_hidden_states(model, rows, tmp_path)
    keep_hidden_states(model, rows_of(7), tmp_path)
    loader: Any = DataLoader(kept, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=100)
    assert_true([*loader], model, rows)
    sent = ForkingPickler.dumps(kept)
    assert len(sent) < bytes_of(model, rows)
    assert_true(pickle.loads(sent), model, rows)


class Gate:
    """A progress bar that stops half way until it is told to go on."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.is_there, self.goes_on = context.Event(), context.Event()

    def __call__(self, batches: Any) -> Iterator[range]:
        for batch in batches:
            if batch.start == 3:
                self.is_there.set()
                self.goes_on.wait(60)
            yield batch


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_make_one_file(is_killed: bool, tmp_path: Path) -> None:
    model, rows, gate, counted, found = frozen(), rows_of(6), Gate(), Counted(), []
    options = {"batch_size": 1, "track": gate}
    first: Any = multiprocessing.get_context("fork").Process(
        target=keep_hidden_states, args=(model, rows, tmp_path), kwargs=options
    )
    first.start()
    assert gate.is_there.wait(60)
    second = threading.Thread(
        target=lambda: found.append(keep_hidden_states(model, rows, tmp_path, batch_size=1, track=counted))
    )
    second.start()
    second.join(0.3)
    assert second.is_alive()
    if is_killed:
        os.kill(first.pid, signal.SIGKILL)
    else:
        gate.goes_on.set()
    first.join()
    second.join(60)
    assert counted.batches == (3 if is_killed else 0)
    assert_true(found[0], model, rows)
    assert sum_nats(model, found[0]) > 0
    assert_read(model, rows, tmp_path)
    assert len(files_in(tmp_path)) == 1
