"""Checks that a save killed at any write leaves a folder that loads as the old or as the new checkpoint."""

import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_python, tiny_causal_lm
from killing import kill_at_every_change
from transformers import PreTrainedModel

from hf_mos import MoSForCausalLM

pytestmark = pytest.mark.slow

SHARDED, OTHERWISE_SHARDED, SINGLE = "25KB", "12KB", "50GB"
OTHER_FILES = ("README.md", "tokenizer.json", "trainer_state.json", "inner/notes.txt")


@functools.cache
def tiny(version: int) -> MoSForCausalLM:
    """Two versions of a model: the same shapes, but every weight, a config's field and a generation option differ."""
    model = MoSForCausalLM.from_causal_lm(
        tiny_causal_lm("llama-tied", seed=version), num_mixtures=2, shortlist_size=version
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += version
    model.generation_config.max_new_tokens = version
    return model


def save(folder: Path, shard_size: str, version: int = 2) -> None:
    tiny(version).save_pretrained(folder, max_shard_size=shard_size)


def loaded_version(folder: Path, load: Callable[..., Any] = MoSForCausalLM.from_pretrained) -> int:
    """The version of the checkpoint in the folder; an AssertionError if it is a mixture."""
    model = load(folder)
    version = model.generation_config.max_new_tokens
    assert model.config.shortlist_size == version
    expected = tiny(version).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    return version


def old_checkpoints(tmp_path: Path, shard_size: str) -> Callable[[], Path]:
    """What copies a folder with version 1 and files of others, again and again."""
    first = tmp_path / "first"
    save(first, shard_size, version=1)
    for name in OTHER_FILES:
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_text(name)
    numbers = itertools.count()
    return lambda: Path(shutil.copytree(first, tmp_path / f"{next(numbers)}"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SINGLE, SINGLE),
        (SINGLE, SHARDED),
        (SHARDED, SINGLE),
        (SHARDED, SHARDED),
        (SHARDED, OTHERWISE_SHARDED),
    ],
)
def test_killed_at_every_write(before: str, after: str, tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    save(usual, after)
    whole = files_of(usual) | {name: name.encode() for name in OTHER_FILES}
    versions = []
    for folder in kill_at_every_change(lambda folder: save(folder, after), old_checkpoints(tmp_path, before)):
        versions.append(loaded_version(folder))
        assert all((folder / name).read_text() == name for name in OTHER_FILES)
        finished = files_of(folder)
        shutil.rmtree(folder)
    assert versions == sorted(versions)
    assert min(versions.count(1), versions.count(2)) > 10
    assert finished == whole  # nothing of the old layout is left


def test_a_killed_save_is_followed_by_a_whole_one(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    save(usual, OTHERWISE_SHARDED)
    whole = files_of(usual) | {name: name.encode() for name in OTHER_FILES}
    for folder in kill_at_every_change(lambda folder: save(folder, SINGLE), old_checkpoints(tmp_path, SHARDED)):
        save(folder, OTHERWISE_SHARDED)
        assert files_of(folder) == whole
        shutil.rmtree(folder)


REMOTE = """
from pathlib import Path
from transformers import AutoModelForCausalLM
for folder in sorted(Path(sys.argv[1]).glob("[0-9]*"), key=lambda path: int(path.name)):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    weights = sum(parameter.detach().double().sum().item() for parameter in model.parameters())
    print(model.config.shortlist_size, model.generation_config.max_new_tokens, round(weights, 3))
"""


def test_remote_code_loads_the_old_or_the_new_one(tmp_path: Path) -> None:
    """Where hf_mos is not installed, and the code of the old checkpoint is another than that of the new one."""
    fresh = old_checkpoints(tmp_path, SHARDED)
    head = tmp_path / "first" / "mos_head.py"
    head.write_text(head.read_text() + "\nOLD = True\n")
    assert len(list(kill_at_every_change(lambda folder: save(folder, SHARDED), fresh))) > 20
    cache = tmp_path / "cache"
    cache.mkdir()
    weights = [round(sum(p.detach().double().sum().item() for p in tiny(v).parameters()), 3) for v in (1, 2)]
    old, new = (f"{v} {v} {weights[v - 1]}" for v in (1, 2))
    lines = run_python(REMOTE, tmp_path, cache=cache).splitlines()
    assert set(lines) == {old, new}
    assert lines == sorted(lines)


def test_the_sweep_finds_what_transformers_loses(tmp_path: Path) -> None:
    """transformers' own save and load, under the same kills: broken or mixed at many of them."""
    stock_save, stock_load = PreTrainedModel.save_pretrained, PreTrainedModel.from_pretrained.__func__
    broken = 0
    for folder in kill_at_every_change(
        lambda folder: stock_save(tiny(2), folder, max_shard_size=SHARDED), old_checkpoints(tmp_path, SHARDED)
    ):
        try:
            loaded_version(folder, functools.partial(stock_load, type(tiny(2))))
        except Exception:
            broken += 1
        shutil.rmtree(folder)
    assert broken > 3
