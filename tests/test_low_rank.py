"""`shift_rank` below D: two layers make the shifts, and the loss with labels keeps its offsets narrow."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import log_prob_gap, random_tokens, tiny_causal_lm, tiny_mos
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_mos import MoSForCausalLM
from hf_mos.remote_code.configuration_mos import default_rank

RANK = {"shift_rank": 4, "shortlist_size": 5}
# The shortlists of all tokens have more rows than the decoder, and fewer.
TOKENS = {"many": random_tokens(4), "few": random_tokens(1)}


def gradients_of(loss: Tensor, model: MoSForCausalLM) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def loss_of_logits(model: MoSForCausalLM, tokens: Tensor) -> Tensor:
    return F.nll_loss(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def assert_same_step(model: MoSForCausalLM, tokens: Tensor) -> None:
    expected = loss_of_logits(model, tokens)
    loss = model(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected)
    found, exact = gradients_of(loss, model), gradients_of(expected, model)
    assert found.keys() == exact.keys() >= {f"lm_head.{layer}.weight" for layer in ("prior", "shift", "widening")}
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("options", [{}, {"shortlist_size": None}, {"num_mixtures": 1}], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_a_step_is_that_of_the_logits(name: str, options: dict[str, Any], tokens: Tensor) -> None:
    assert_same_step(tiny_mos(name, **RANK | options).double().train(), tokens)


def test_a_frozen_decoder_and_a_frozen_widening() -> None:
    model = tiny_mos(**RANK).double().train()
    exact = gradients_of(loss_of_logits(model, TOKENS["many"]), model)
    for frozen in ("lm_head.weight", "lm_head.widening.weight"):
        model.requires_grad_(True).get_parameter(frozen).requires_grad_(False)
        found = gradients_of(model(TOKENS["many"], labels=TOKENS["many"]).loss, model)
        assert found.keys() == exact.keys() - {frozen}
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, exact[name])


def test_hooks_and_forwards_of_the_widening_are_called() -> None:
    model = tiny_mos(**RANK).double().train()
    calls: list[int] = []
    model.lm_head.widening.register_forward_hook(lambda *_: calls.append(1))
    assert_same_step(model, TOKENS["many"])
    assert len(calls) == 2  # by the step, and by the logits

    model = tiny_mos(**RANK).double().train()
    model.lm_head.widening.forward = lambda codes: 2 * F.linear(codes, model.lm_head.widening.weight)
    assert_same_step(model, TOKENS["many"])


def test_a_compiled_step_is_the_same() -> None:
    model = tiny_mos(**RANK).double().train()
    tokens = TOKENS["many"]
    expected = gradients_of(model(tokens, labels=tokens).loss, model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name, gradient in gradients_of(compiled(tokens, labels=tokens).loss, model).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_starts_as_the_softmax_and_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    softmax, tokens = tiny_causal_lm(name), random_tokens()
    fresh = MoSForCausalLM.from_causal_lm(tiny_causal_lm(name), num_mixtures=3, **RANK)
    assert log_prob_gap(fresh, softmax, input_ids=tokens) < 1e-5
    model = tiny_mos(name, **RANK)
    model.save_pretrained(tmp_path)
    loaded = MoSForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.shift_rank == 4
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_the_default_rank_follows_the_sizes() -> None:
    """Of SmolLM2, Llama-3-8B, Llama-2-7B, Qwen3-0.6B; of few classes; of a small width."""
    sizes = [(576, 49152), (4096, 128256), (4096, 32000), (1024, 151936), (1024, 8192), (1024, 97), (32, 97)]
    assert [default_rank(16, width, classes) for width, classes in sizes] == [128, 128, 64, 1024, 32, 8, 32]
    assert MoSForCausalLM.from_causal_lm(tiny_causal_lm()).config.shift_rank == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, RANK], ids=str)
def test_a_conversion_is_the_same_model_each_time(options: dict[str, Any], dtype: torch.dtype) -> None:
    """So an adapter that was saved without the head fits the next conversion."""
    found = []
    for seed, init_seed in ((0, 0), (1, 0), (1, 7)):
        torch.manual_seed(seed)
        softmax = tiny_causal_lm().to(dtype)
        torch.manual_seed(seed)
        model = MoSForCausalLM.from_causal_lm(softmax, init_seed=init_seed, **options)
        assert model.config.init_seed == init_seed
        found.append(model.state_dict())
    assert all(torch.equal(found[0][key], weight) for key, weight in found[1].items())
    assert not torch.equal(found[0]["lm_head.prior.weight"], found[2]["lm_head.prior.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shift_rank", [4, 32])
def test_the_start_does_not_depend_on_the_default_dtype(shift_rank: int, dtype: torch.dtype) -> None:
    """transformers sets it while it makes a model in a dtype, whose start would not be that of a conversion."""
    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm("llama").to(dtype), num_mixtures=3, shift_rank=shift_rank)
    made = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    parts = [name for name, _ in model.lm_head.named_parameters() if "." in name]
    assert len(parts) == (3 if shift_rank == 4 else 2)
    for name in parts:
        weight, other = (each.lm_head.get_parameter(name) for each in (model, made))
        assert weight.dtype == other.dtype
        assert torch.equal(weight, other), name
