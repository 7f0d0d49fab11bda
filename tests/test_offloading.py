"""Checks models whose weights lie elsewhere: on the meta device, in CPU memory, on the disk, or on several devices."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from helpers import BACKBONES, HEADS, greedy, log_prob_gap, random_tokens, tiny_causal_lm, tiny_mos
from transformers import AutoModelForCausalLM

from hf_mos import MoSForCausalLM

TOKENS = random_tokens()
EXACT = 5e-6
# transformers says so when it saves what is offloaded, and when it generates from it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning"),
]


def assert_works(model: MoSForCausalLM, expected: Any, folder: Path, gap: float = EXACT) -> None:
    """The model predicts what `expected` does, with and without labels, generates, saves and loads."""
    assert log_prob_gap(model, expected, input_ids=TOKENS) <= gap
    with torch.no_grad():
        losses = [m(input_ids=TOKENS, labels=TOKENS).loss for m in (model, expected)]
        skipped = model(input_ids=TOKENS, labels=TOKENS, skip_logits=True)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(skipped.loss, losses[1])
    assert skipped.logits is None
    assert torch.equal(greedy(model, TOKENS, 3), greedy(expected, TOKENS, 3))
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.tie_word_embeddings == (
        expected.get_input_embeddings().weight is expected.get_output_embeddings().weight
    )
    assert log_prob_gap(loaded, expected, input_ids=TOKENS) <= gap


# ------------------------------------------------------------------------------------ conversion of an offloaded model


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    "offload", [cpu_offload, lambda m: cpu_offload_with_hook(m), "disk"], ids=["cpu", "hook", "disk"]
)
def test_conversion_of_a_model_that_was_offloaded(offload: Any, name: str, head: dict, tmp_path: Path) -> None:
    softmax = tiny_causal_lm(name)
    base = copy.deepcopy(softmax)
    disk_offload(base, tmp_path / "offload") if offload == "disk" else offload(base)
    assert_works(MoSForCausalLM.from_causal_lm(base, **head), softmax, tmp_path / "saved", gap=1e-5)
    assert log_prob_gap(base, softmax, input_ids=TOKENS) <= EXACT  # still works


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("device_map", ["apart", "auto", {"": "disk"}, {"": "cpu"}], ids=str)
def test_conversion_with_a_device_map(device_map: Any, name: str, tmp_path: Path) -> None:
    softmax = tiny_causal_lm(name)
    softmax.save_pretrained(tmp_path / "softmax")
    if device_map == "apart":
        if softmax.get_output_embeddings().weight is softmax.get_input_embeddings().weight:
            pytest.skip("transformers does not load a tied weight in two places")
        device_map = {child: "cpu" for child, _ in softmax.named_children()} | {"lm_head": "disk"}
    options = {"device_map": device_map, "max_memory": {"cpu": "40KB"}, "offload_folder": tmp_path / "offload"}
    model = MoSForCausalLM.from_causal_lm(str(tmp_path / "softmax"), **options)
    assert not {weight.device.type for weight in (model.lm_head.prior.weight, model.lm_head.shift.weight)} - {"cpu"}
    if device_map != {"": "cpu"}:  # which transformers does not dispatch
        given = model.hf_device_map
        assert set(given) <= {path for path, _ in model.named_modules()}
        assert set(given.values()) == set(device_map.values() if isinstance(device_map, dict) else ["disk"])
    assert_works(model, softmax, tmp_path / "saved", gap=1e-5)


# ----------------------------------------------------------------------------------------- a mixture, placed elsewhere


def placed(model: MoSForCausalLM, how: str, folder: Path) -> MoSForCausalLM:
    model.save_pretrained(folder / "model")
    device_map = {"model": "cpu", "lm_head": "disk"}
    if how == "load_checkpoint_and_dispatch":
        with init_empty_weights():
            empty = MoSForCausalLM(copy.deepcopy(model.config)).eval()
        empty.tie_weights()
        return load_checkpoint_and_dispatch(empty, folder / "model", device_map={"": "cpu"})
    if how == "load_checkpoint_and_dispatch to disk":
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(model.config).eval()
        empty.tie_weights()
        return load_checkpoint_and_dispatch(
            empty, folder / "model", device_map=device_map, offload_folder=folder / "offload"
        )
    if how == "to_empty":
        with torch.device("meta"):
            empty = MoSForCausalLM(copy.deepcopy(model.config)).eval()
        buffers = {
            name: buffer.clone() for name, buffer in model.named_buffers()
        }  # of the backbone: not in a checkpoint
        empty.to_empty(device="cpu")
        empty.tie_weights()
        empty.load_state_dict(model.state_dict())
        for name, buffer in empty.named_buffers():
            buffer.copy_(buffers[name])
        return empty
    if how == "dispatch_model":
        return dispatch_model(copy.deepcopy(model), device_map, offload_dir=folder / "offload")
    if how == "disk_offload":
        return disk_offload(copy.deepcopy(model), folder / "offload")
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded)
    return offloaded


HOW = [
    "load_checkpoint_and_dispatch",
    "load_checkpoint_and_dispatch to disk",
    "to_empty",
    "dispatch_model",
    "disk_offload",
    "cpu_offload",
]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
@pytest.mark.parametrize("how", HOW)
def test_a_placed_mixture_predicts_the_same(how: str, name: str, head: dict, tmp_path: Path) -> None:
    model = tiny_mos(name, **head)
    if how.endswith("to disk") and model.config.tie_word_embeddings:
        pytest.skip("accelerate looks on the disk for each name of a tied weight, for every model")
    twin = placed(model, how, tmp_path)
    assert log_prob_gap(twin, model, input_ids=TOKENS) <= EXACT
    with torch.no_grad():
        loss = twin(input_ids=TOKENS, labels=TOKENS, skip_logits=True).loss
        torch.testing.assert_close(loss, model(input_ids=TOKENS, labels=TOKENS).loss)
    assert torch.equal(greedy(twin, TOKENS, 3), greedy(model, TOKENS, 3))


@pytest.mark.parametrize("make", [MoSForCausalLM, AutoModelForCausalLM.from_config])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_no_buffer_stays_on_the_meta_device(make: Callable[..., Any], head: dict) -> None:
    config = tiny_mos(**head).config
    with init_empty_weights():
        model = make(config)
    assert all(weight.is_meta for weight in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert infer_auto_device_map(model, max_memory={"cpu": "1GB"}) == {"": "cpu"}


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_new_tensors_lie_where_the_decoder_computes(head: dict) -> None:
    base = tiny_causal_lm()
    with torch.device("meta"):
        on_meta = copy.deepcopy(base).to("meta")
    assert all(weight.is_meta for weight in MoSForCausalLM.from_causal_lm(on_meta, **head).parameters())
    base.to(torch.bfloat16)
    shift = MoSForCausalLM.from_causal_lm(base, **head).lm_head.shift
    assert shift.weight.dtype == torch.bfloat16
    assert shift.weight.device.type == "cpu"
