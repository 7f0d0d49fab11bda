"""Checks that a broken checkpoint is refused: the error names the file, the key, the expected and the given value."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from helpers import log_prob_gap, random_tokens, tiny_mos
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_mos
from hf_mos import MoSConfig, MoSForCausalLM

PRIOR = "lm_head.prior.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_mos("llama-tied").save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny_mos("llama-tied").save_pretrained(tmp_path / "sharded", max_shard_size="25KB")
    return tmp_path / "sharded"


def refused(folder: Path, error: type[Exception], *words: str, **kwargs: object) -> None:
    for loader in (AutoModelForCausalLM, MoSForCausalLM, hf_mos.MoSLlamaForCausalLM):
        with pytest.raises(error, match=".*".join(map(re.escape, words))):
            loader.from_pretrained(folder, **kwargs)


def change(folder: Path, key: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[key]
    if tensor is not None:
        weights[key] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("key", [PRIOR, "lm_head.shift.weight", "model.norm.weight"])
def test_a_missing_tensor(folder: Path, key: str) -> None:
    change(folder, key, None)
    refused(folder, ValueError, "model.safetensors", "without", key, "of shape")


@pytest.mark.parametrize("key", ["lm_head.prior.bias", "lm_head.shift.bias", "lm_head.bias", "lm_head.latent.weight"])
def test_a_tensor_that_the_config_does_not_name(folder: Path, key: str) -> None:
    weights = load_file(folder / "model.safetensors") | {key: torch.ones(3)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, ValueError, "model.safetensors: expected the weights of the head", f"given {key} too")


@pytest.mark.parametrize("given", [(3, 31), (4, 32), (32, 3), (96,)])
def test_a_misshapen_tensor(folder: Path, given: tuple[int, ...]) -> None:
    change(folder, PRIOR, torch.zeros(given))
    refused(folder, ValueError, f"model.safetensors: {PRIOR}: expected (3, 32)", f"given {given}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", [PRIOR, "lm_head.shift.weight"])
def test_a_tensor_that_is_not_finite(folder: Path, key: str, dtype: torch.dtype, value: float) -> None:
    tensor = load_file(folder / "model.safetensors")[key].to(dtype)
    tensor[1, 2] = value
    change(folder, key, tensor)
    refused(folder, ValueError, f"model.safetensors: {key}: expected finite values, given {value}", dtype=dtype)


def test_another_number_of_mixtures(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_mixtures": 5}))
    refused(folder, ValueError, f"{PRIOR}: expected (5, 32), as the config says, given (3, 32)")
    model = MoSForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)  # as asked for
    assert model.lm_head.num_mixtures == 5


@pytest.mark.parametrize("kept", [0, 5, 200, 10_000])
def test_a_file_cut_short(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, OSError, "model.safetensors: expected a whole safetensors file, given another: ", "header")


def test_a_file_with_another_content(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 20) + b"these are no tensors" + bytes(99))
    refused(folder, OSError, "model.safetensors: expected a whole safetensors file, given another: ", "JSON")


def test_a_shard_cut_short_or_gone(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(shards, OSError, f"{shard.name}: expected a whole safetensors file, given another: ", "incomplete")
    shard.unlink()
    refused(shards, OSError, "model.safetensors.index.json", f"expected {shard.name} beside it")


def test_a_shard_of_another_checkpoint(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("model-*.safetensors"))
    first.write_bytes(second.read_bytes())
    refused(shards, OSError, first.name, "expected", "as model.safetensors.index.json says")


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors", "C:\\b"]
)
def test_an_index_that_leads_outside(shards: Path, place: str) -> None:
    index_file = shards / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"][PRIOR] = place
    index_file.write_text(json.dumps(index))
    refused(shards, ValueError, "index.json: expected the name of a file in this folder, given", repr(place))


def test_a_broken_index(shards: Path) -> None:
    index_file = shards / "model.safetensors.index.json"
    content = index_file.read_text()
    for broken in (content[:100], "[]", "{}"):
        index_file.write_text(broken)
        refused(shards, OSError, "model.safetensors.index.json", "expected")


@pytest.mark.parametrize("content", ["", '{"model_type": "mos"', "\x00\x00"])
def test_a_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, OSError, "config.json")


def test_a_config_with_a_wrong_field(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_mixtures": "three"}))
    refused(folder, ValueError, "num_mixtures: expected an int of at least 1, given 'three'")


def test_pickles_are_refused_and_can_be_converted(tmp_path: Path) -> None:
    model = tiny_mos("llama-tied")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, ValueError, "expected safetensors, given pytorch_model.bin, pickled", "torch.load")
    refused(tmp_path, ValueError, "use_safetensors: expected True or None", use_safetensors=False)
    # What the message says:
    converted = MoSForCausalLM(MoSConfig.from_pretrained(tmp_path))
    converted.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", weights_only=True), strict=False)
    converted.save_pretrained(tmp_path)
    loaded = MoSForCausalLM.from_pretrained(tmp_path)  # the pickle beside it is not read
    assert log_prob_gap(model, loaded, input_ids=random_tokens()) == 0


def test_what_names_a_file_in_the_config_stays_inside(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "../other.safetensors"}))
    refused(
        folder, ValueError, "config.json: expected the name of a file in this folder, given '../other.safetensors'"
    )
