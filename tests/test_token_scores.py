"""Checks the per-token scores that preference trainers read against their definitions."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import HEADS, LargestTensor, random_tokens, tiny_mos
from torch import Tensor, nn

from hf_mos import MoSForCausalLM, MoSLMHead
from hf_mos.training.token_scores import SCORES, ScoreOptions, score_tokens

MODELS: list[dict[str, Any]] = [{"shortlist_size": None}, {"shortlist_size": 5}, {"name": "gemma2"}, {"name": "gpt2"}]


def scoring(options: ScoreOptions) -> Any:
    return functools.partial(score_tokens, options)


def by_hand(model: MoSForCausalLM, tokens: Tensor, labels: Tensor, temperature: float) -> dict[str, Tensor]:
    logits = model(input_ids=tokens).logits[:, :-1] / temperature
    targets, counts = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    probs = logits.softmax(-1)
    scores = {
        "log_probs": logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        "entropy": torch.distributions.Categorical(probs=probs).entropy(),
        "log_sum_sq_probs": probs.square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": probs.argmax(-1) == targets,
    }
    return {name: score * counts for name, score in scores.items()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("hooked", [False, True])
def test_scores_and_their_gradients(options: dict, temperature: float, hooked: bool) -> None:
    model = tiny_mos(**options).double().train()
    if hooked:  # then the scores are those of the logits that the hook returns
        model.lm_head.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    model.score_options = ScoreOptions(temperature, SCORES)
    tokens = random_tokens()
    labels = tokens.clone()
    labels[0, :5] = -100
    scores = model(input_ids=tokens, labels=labels, fused_lm_head=True)
    expected = by_hand(model, tokens, labels, temperature)
    for name in SCORES:
        torch.testing.assert_close(scores[name], expected[name], atol=1e-10, rtol=1e-10)
    assert scores.label_mask.equal(labels[:, 1:] != -100)
    torch.testing.assert_close(scores.loss, -expected["log_probs"].sum() / scores.label_mask.sum())
    weights = torch.rand(scores.log_probs.shape, dtype=torch.float64)
    for entropy_weight in (0.0, 0.3):
        gradients = []
        for values in (model(input_ids=tokens, labels=labels, fused_lm_head=True), None):
            values = by_hand(model, tokens, labels, temperature) if values is None else values
            objective = (weights * values["log_probs"]).sum()
            if entropy_weight:
                objective = objective + entropy_weight * values["entropy"].sum()
            gradients.append(torch.autograd.grad(objective, list(model.parameters())))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_log_probs_alone_without_gradients_make_no_distribution(options: dict) -> None:
    model = tiny_mos(**options)
    hidden_states, targets = torch.randn(7, 32), torch.arange(7)
    with torch.no_grad():
        scores = model.lm_head(hidden_states, targets=targets, function=scoring(ScoreOptions()))
        expected = model.lm_head(hidden_states).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores[0], expected, atol=1e-5, rtol=1e-5)
    assert scores[1:] == (None,) * 4


def test_the_loss_of_the_scores_is_the_models_own() -> None:
    model = tiny_mos("mixtral").train()
    tokens = random_tokens()
    arguments = {"input_ids": tokens, "labels": tokens, "num_items_in_batch": 7, "output_router_logits": True}
    torch.testing.assert_close(model(**arguments, fused_lm_head=True).loss, model(**arguments).loss)
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    scores = model(input_ids=tokens, shift_labels=shifted, fused_lm_head=True)
    assert scores.log_probs.shape == tokens.shape
    assert not scores.label_mask[:, -1].any()
    torch.testing.assert_close(scores.loss, model(input_ids=tokens, labels=tokens).loss)


def test_scores_of_no_token_have_gradients() -> None:
    model = tiny_mos().train()
    tokens = random_tokens()
    model(input_ids=tokens, labels=torch.full_like(tokens, -100), fused_lm_head=True).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_no_tensor_is_as_wide_as_the_batch_and_the_vocabulary(
    options: dict, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_mos.remote_code.mos_decoder.CPU_BUDGET_BYTES", 2**16)
    head = MoSLMHead.take_over(nn.Linear(32, 8192, bias=False), num_mixtures=3, **options)
    hidden_states = torch.randn(64, 32, requires_grad=True)
    with LargestTensor() as largest:
        wanted = ScoreOptions(temperature, SCORES)
        scores = head(hidden_states, targets=torch.arange(64), function=scoring(wanted))
        scores[0].sum().backward()
    assert largest.numel < 64 * 8192


def test_scores_in_bf16_under_autocast() -> None:
    model = tiny_mos().train()
    tokens = random_tokens()
    model.score_options = ScoreOptions(1.0, SCORES)
    expected = model(input_ids=tokens, labels=tokens, fused_lm_head=True)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(input_ids=tokens, labels=tokens, fused_lm_head=True)
    assert scores.log_probs.dtype == torch.float32
    torch.testing.assert_close(scores.log_probs, expected.log_probs, atol=0.15, rtol=0.05)
    scores.loss.backward()
    assert all(parameter.grad is not None for parameter in model.lm_head.parameters())
