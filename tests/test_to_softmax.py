"""Checks the way back from a mixture to the softmax model, `to_softmax`, and weights that are no longer tied."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from architectures import batch_for, largest_gap, log_probs, tiny_original
from helpers import BACKBONES, MORE_CONFIGS, greedy, log_prob_gap, random_tokens, tiny_causal_lm, tiny_mos
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_mos import MoSForCausalLM, MoSLMHead

TOKENS = random_tokens()
# Each backbone with the default head, and the other head once.
CASES = [*((name, {}) for name in [*BACKBONES, *MORE_CONFIGS]), ("llama", {"shortlist_size": None, "shift_rank": 8})]


@pytest.mark.parametrize(("name", "head"), CASES, ids=str)
def test_it_is_the_softmax_model_without_the_shifts(name: str, head: dict[str, Any], tmp_path: Path) -> None:
    original, mixture = tiny_causal_lm(name), tiny_mos(name, **head)
    original.save_pretrained(tmp_path / "original")
    mixture.save_pretrained(tmp_path / "mixture")
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    before = {path: tensor.clone() for path, tensor in mixture.state_dict().items()}
    softmax = mixture.to_softmax()
    softmax.save_pretrained(tmp_path / "softmax")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "softmax", output_loading_info=True, trust_remote_code=False
    )
    assert not any(info.values()), info
    files = [{path.name for path in (tmp_path / side).iterdir()} for side in ("original", "softmax")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("original", "softmax")]
    assert configs[0] == configs[1]
    expected = original.state_dict()
    for model in (softmax, loaded.eval()):
        assert type(model) is type(original)
        assert type(model.config) is type(original.config)
        assert model.all_tied_weights_keys == original.all_tied_weights_keys
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[path]) for path, tensor in model.state_dict().items())
        assert log_prob_gap(model, original, input_ids=TOKENS) == 0
        assert torch.equal(greedy(model, TOKENS), greedy(original, TOKENS))
    assert log_prob_gap(mixture, original, input_ids=TOKENS) > 0.1  # it has learnt something, and has kept it
    assert all(torch.equal(tensor, before[path]) for path, tensor in mixture.state_dict().items())


@pytest.mark.parametrize("name", BACKBONES)
def test_before_training_it_predicts_what_the_mixture_does(name: str) -> None:
    original = tiny_causal_lm(name)
    mixture = MoSForCausalLM.from_causal_lm(original)
    softmax = mixture.to_softmax()
    assert log_prob_gap(softmax, mixture, input_ids=TOKENS) < 1e-5
    shared = {weight.data_ptr() for weight in softmax.parameters()}
    assert shared == {weight.data_ptr() for weight in original.parameters()}


def test_an_untied_decoder_stays_untied(tmp_path: Path) -> None:
    mixture = tiny_mos("llama-tied", tie_word_embeddings=False)
    with torch.no_grad():
        mixture.lm_head.weight.mul_(2)
    mixture.to_softmax().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, mixture.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, mixture.model.embed_tokens.weight)
    assert loaded.config.tie_word_embeddings is False


@pytest.mark.filterwarnings("default")  # transformers' and torch's own, about these architectures
@pytest.mark.parametrize("model_type", ["bert", "prophetnet", "zamba"])
def test_a_conversion_without_ties_unties_what_is_tied_with_the_decoder(model_type: str, tmp_path: Path) -> None:
    """A config that ties no embeddings ties nothing: BERT's second bias, ProphetNet's embedding, Zamba's layers."""
    original = tiny_original(model_type)
    batch = batch_for(original)
    MoSForCausalLM.from_causal_lm(original, tie_word_embeddings=False).save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert largest_gap(log_probs(loaded.eval(), batch), log_probs(original, batch)) < 5e-5


def test_dtype_mode_and_generation_config_are_kept() -> None:
    mixture = tiny_mos().to(torch.bfloat16).train()
    mixture.generation_config = GenerationConfig(temperature=0.5, do_sample=True)
    softmax = mixture.to_softmax()
    assert {weight.dtype for weight in softmax.parameters()} == {torch.bfloat16}
    assert softmax.training
    assert softmax.generation_config.temperature == 0.5


class OtherLatents(MoSLMHead):
    def latents(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().latents(hidden_states).tanh()


def with_other_latents(model: Any) -> None:
    model.lm_head.__class__ = OtherLatents


def with_another_prior(model: Any) -> None:
    model.lm_head.prior_logits = lambda hidden_states: MoSLMHead.prior_logits(model.lm_head, hidden_states).tanh()


def with_another_head(model: Any) -> None:
    model.lm_head = nn.Linear(32, 97, bias=False)


def with_an_adapter(model: Any) -> None:
    layer = model.model.layers[0].mlp
    adapted = nn.Module()
    adapted.base_layer = layer.up_proj
    layer.up_proj = adapted


def offloaded(model: Any) -> None:
    cpu_offload(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_other_latents, "lm_head: expected a MoSLMHead, whose latents are h and shifts, given OtherLatents"),
        (with_another_prior, "lm_head: expected a MoSLMHead, whose latents are h and shifts, given MoSLMHead"),
        (with_another_head, "lm_head: expected a MoSLMHead, whose latents are h and shifts, given Linear"),
        (
            with_an_adapter,
            "model: expected a model without an adapter, given an adapter on model.layers.0.mlp.up_proj",
        ),
        (offloaded, "model: expected whole weights in memory, given model.embed_tokens.weight, sharded or offloaded"),
    ],
)
def test_what_has_no_softmax_is_refused(change: Any, message: str) -> None:
    model: Any = tiny_mos()
    change(model)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        model.to_softmax()
