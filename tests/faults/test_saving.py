"""Checks saving with variants, shards, several processes, offloaded weights and the Hub."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import log_prob_gap, random_tokens, tiny_mos
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from hf_mos import MoSConfig, MoSForCausalLM
from hf_mos.tools.loading import load_model


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_saving_over_another_layout_leaves_nothing_of_it(tmp_path: Path) -> None:
    sizes = ("25KB", "12KB", "50GB", "25KB", "50GB")
    for seed, size in enumerate(sizes):
        model = tiny_mos(seed=seed)
        model.save_pretrained(tmp_path / "one", max_shard_size=size)
        fresh = tmp_path / f"fresh {seed}"
        model.save_pretrained(fresh, max_shard_size=size)
        assert names(tmp_path / "one") == names(fresh)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
        assert log_prob_gap(model, loaded, input_ids=random_tokens()) == 0


@pytest.mark.parametrize("size", ["50GB", "25KB"])
def test_variants_stay_beside_each_other(size: str, tmp_path: Path) -> None:
    model = tiny_mos()
    model.save_pretrained(tmp_path, max_shard_size=size)
    model.save_pretrained(tmp_path, variant="copy", max_shard_size=size)
    model.save_pretrained(tmp_path, max_shard_size=size)
    for variant in (None, "copy"):
        loaded = MoSForCausalLM.from_pretrained(tmp_path, variant=variant)
        assert log_prob_gap(model, loaded, input_ids=random_tokens()) == 0
    model.save_pretrained(tmp_path, variant="copy")
    assert len(list(tmp_path.glob("model.copy*.safetensors"))) == 1


def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = tiny_mos(), tmp_path / "model"
    model.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_mos(seed=1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("killed", ["while it writes", "when all is written"])
def test_a_first_save_that_was_killed_is_nothing_to_load(
    killed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*paths: Any) -> None:
        raise Killed

    if killed == "while it writes":
        (tmp_path / "_saving_0123456789ab").mkdir()
    else:
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", kill)
            with pytest.raises(Killed):
                tiny_mos().save_pretrained(tmp_path)
    assert [name.partition("_saving_")[0] for name in names(tmp_path)] == [""]
    for load in (MoSForCausalLM.from_pretrained, MoSForCausalLM.from_causal_lm, load_model):
        with pytest.raises(ValueError, match=f"given '{tmp_path}', which holds an unfinished save, _saving_"):
            load(tmp_path)
    with pytest.raises(ValueError, match=r"model_type: expected 'mos', given None\."):
        MoSConfig.from_pretrained(tmp_path)
    tiny_mos().save_pretrained(tmp_path)  # over what the killed save left
    assert log_prob_gap(tiny_mos(), MoSForCausalLM.from_pretrained(tmp_path), input_ids=random_tokens()) == 0
    assert not list(tmp_path.glob("_saving_*"))


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    tiny_mos().save_pretrained(tmp_path, is_main_process=False)
    assert not names(tmp_path)


def test_a_folder_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    model = tiny_mos()
    for size in ("25KB", "50GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert log_prob_gap(model, MoSForCausalLM.from_pretrained(tmp_path), input_ids=random_tokens()) == 0
    assert not list(tmp_path.glob("_saving_*"))


def test_a_model_is_saved_over_the_files_that_it_was_loaded_from(tmp_path: Path) -> None:
    model = tiny_mos()
    model.save_pretrained(tmp_path, max_shard_size="25KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path, max_shard_size="25KB")
    assert log_prob_gap(model, MoSForCausalLM.from_pretrained(tmp_path), input_ids=random_tokens()) == 0
    assert log_prob_gap(model, loaded, input_ids=random_tokens()) == 0


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_an_offloaded_model(tmp_path: Path) -> None:
    model = tiny_mos()
    model.save_pretrained(tmp_path / "whole")
    device_map = {"model": "disk", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    offloaded.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "offload", ignore_errors=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key


def test_pushing_to_the_hub_uploads_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[dict[str, Any]] = []
    repositories: list[str] = []

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> Any:
        repositories.append(repo_id)
        return type("RepoUrl", (), {"repo_id": f"me/{repo_id}"})()

    def create_commit(self: HfApi, repo_id: str, operations: list[Any], **kwargs: Any) -> str:
        files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        uploads.append({"repo_id": repo_id, "files": files, **kwargs})
        return "committed"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    folder = tmp_path / "my-model"
    (folder / "notes").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("stays here")
    model = tiny_mos()
    model.save_pretrained(folder, push_to_hub=True, commit_message="first", max_shard_size="25KB")
    assert repositories == ["my-model"]
    (upload,) = uploads
    assert upload["repo_id"] == "me/my-model"
    assert upload["commit_message"] == "first"
    assert upload["files"].keys() == names(folder) - {"notes", "tokenizer.json"} | {"README.md"}
    for name, content in upload["files"].items():
        assert name == "README.md" or content == (folder / name).read_bytes()
    model.save_pretrained(folder, push_to_hub=True, repo_id="other")
    assert repositories[1:] == ["other"]
