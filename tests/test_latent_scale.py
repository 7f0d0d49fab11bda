"""`latent_scale`: `.grad` is the gradient, and Adam moves the head as a learning rate of its own would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import HEADS, logged_losses, part_components, random_tokens, tiny_causal_lm, tiny_mos
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, RemBertConfig, RemBertForCausalLM, Trainer, TrainingArguments

from hf_mos import MoSConfig, MoSForCausalLM
from hf_mos.remote_code.configuration_mos import default_scale

SCALE = 8.0  # a power of two, so that both ways round alike
STEPS, RATE = 6, 1e-2
TOKENS = random_tokens(4)


# ------------------------------------------------------------------------------------------------------ true gradients


def written_loss(head: Any, hidden_states: Tensor, targets: Tensor, prior: Tensor, shift: Tensor) -> Tensor:
    """The mixture's loss as it is written, of a prior and a shift that are given."""
    shifts = F.linear(hidden_states, shift).unflatten(-1, (head.num_mixtures, -1))
    latents = hidden_states.unsqueeze(-2) + head.latent_scale * shifts
    log_gate = F.log_softmax(F.linear(head.latent_scale * hidden_states, prior), dim=-1)
    logits = F.linear(latents, head.weight)
    if head.shortlist_size is not None:
        shared = F.linear(latents.mean(-2), head.weight)
        shortlist = shared.topk(head.shortlist_size).indices.unsqueeze(-2).expand(*logits.shape[:-1], -1)
        logits = shared.unsqueeze(-2).expand_as(logits).scatter(-1, shortlist, logits.gather(-1, shortlist))
        log_gate = F.log_softmax(log_gate + logits.logsumexp(-1), dim=-1)
    log_probs = torch.logsumexp(log_gate.unsqueeze(-1) + F.log_softmax(logits, dim=-1), dim=-2)
    return F.nll_loss(log_probs, targets)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("scale", [0.25, 1.0, 10.0])
def test_the_gradient_is_the_gradient(scale: float, head: dict[str, Any]) -> None:
    model = tiny_mos(latent_scale=scale, **head).double().train()
    model(TOKENS, labels=TOKENS).loss.backward()
    hidden_states = model.head_inputs(input_ids=TOKENS)[:, :-1].flatten(0, 1)
    targets = TOKENS[:, 1:].flatten()
    weights = [model.lm_head.prior.weight, model.lm_head.shift.weight]
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    expected = written_loss(model.lm_head, hidden_states, targets, *leaves)
    for weight, gradient in zip(weights, torch.autograd.grad(expected, leaves), strict=True):
        assert gradient.norm() > 1e-4
        torch.testing.assert_close(weight.grad, gradient)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("layer", ["prior", "shift"])
def test_the_gradient_is_the_slope_of_the_loss(layer: str, head: dict[str, Any]) -> None:
    model = tiny_mos(latent_scale=SCALE, **head).double().train()
    weight = getattr(model.lm_head, layer).weight
    direction, step = torch.randn_like(weight), 1e-6
    model(TOKENS, labels=TOKENS).loss.backward()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            losses.append(model(TOKENS, labels=TOKENS).loss.item())
            weight -= sign * step * direction
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float((weight.grad * direction).sum()), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ learning rates


def pair(**options: Any) -> tuple[MoSForCausalLM, MoSForCausalLM]:
    """The same mixture with a scale, and with a scale of 1."""
    models = [
        MoSForCausalLM.from_causal_lm(tiny_causal_lm(), num_mixtures=3, latent_scale=scale, **options).double()
        for scale in (SCALE, 1.0)
    ]
    for model in models:
        part_components(model)  # while they are equal, the prior's gradient is nothing but rounding
    with torch.no_grad():
        models[1].lm_head.prior.weight.copy_(SCALE * models[0].lm_head.prior.weight)
    return models[0], models[1]


def groups(model: MoSForCausalLM, head_rate: float) -> list[dict[str, Any]]:
    """Parameter groups, written by hand: the prior and the shifts learn at `head_rate`."""
    new = [model.lm_head.prior.weight, model.lm_head.shift.weight]
    old = [weight for weight in model.parameters() if all(weight is not other for other in new)]
    return [{"params": old, "lr": RATE}, {"params": new, "lr": head_rate}]


def losses_of(model: MoSForCausalLM, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in range(STEPS):
        tokens = random_tokens(4, seed=step % 2)
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Each with the factor of the head's rate that the scale stands for. Adam and Adagrad divide by the gradients' size.
OPTIMIZERS: dict[str, tuple[float, Callable[..., torch.optim.Optimizer]]] = {
    "AdamW": (SCALE, lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-30)),
    "fused AdamW": (SCALE, lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-30, fused=True)),
    "Adagrad": (SCALE, lambda groups: torch.optim.Adagrad(groups, eps=1e-30)),
    "SGD": (SCALE**2, lambda groups: torch.optim.SGD(groups, lr=RATE)),
    "SGD with momentum": (SCALE**2, lambda groups: torch.optim.SGD(groups, lr=RATE, momentum=0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_equals_parameter_groups(name: str, head: dict[str, Any]) -> None:
    """To the last digits, so that the rest of the model moves as it would without the scale."""
    factor, make = OPTIMIZERS[name]
    scaled, plain = pair(**head)
    given = losses_of(scaled, make([{"params": [*scaled.parameters()], "lr": RATE}]))
    expected = losses_of(plain, make(groups(plain, factor * RATE)))
    assert given == pytest.approx(expected, rel=1e-7)
    assert given[-1] < given[0]
    weights = scaled.model.state_dict()
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(SCALE * scaled.lm_head.shift.weight, plain.lm_head.shift.weight, rtol=1e-6, atol=1e-8)


def test_one_rate_differs_from_the_same_rate_without_a_scale() -> None:
    """The comparison above can fail."""
    scaled, plain = pair()
    given = losses_of(scaled, torch.optim.AdamW(scaled.parameters(), lr=RATE))
    assert given != pytest.approx(losses_of(plain, torch.optim.AdamW(plain.parameters(), lr=RATE)), rel=1e-4)


def test_weight_decay_pulls_to_one_softmax() -> None:
    model = tiny_mos()
    hidden = torch.randn(5, 32)
    distances = []
    optimizer = torch.optim.AdamW(model.lm_head.shift.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(3):
        model.lm_head.shift.weight.grad = torch.zeros_like(model.lm_head.shift.weight)
        distances.append((model.lm_head.latents(hidden) - hidden.unsqueeze(1)).norm().item())
        optimizer.step()
    assert distances == pytest.approx([distances[0], 0.9 * distances[0], 0.81 * distances[0]])


class Blocks(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = random_tokens(1, seed=index)[0]
        return {"input_ids": tokens, "labels": tokens}


def test_the_trainer_needs_nothing_else(tmp_path: Path) -> None:
    scaled, plain = (model.float() for model in pair())
    common = {"max_steps": 4, "learning_rate": RATE, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    losses = []
    for name, model in (("scaled", scaled), ("plain", plain)):
        # The norm of all gradients, by which the Trainer clips, has the scale in it.
        arguments = TrainingArguments(output_dir=str(tmp_path / name), max_grad_norm=0.0, **common)
        trainer = Trainer(model, arguments, train_dataset=Blocks())
        if model is plain:
            optimizer = torch.optim.AdamW(groups(plain, SCALE * RATE), weight_decay=0.0)
            trainer = Trainer(model, arguments, train_dataset=Blocks(), optimizers=(optimizer, None))
        trainer.train()
        losses.append(logged_losses(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # the epsilon of Adam counts more without the scale
    assert losses[0][-1] < losses[0][0]


# --------------------------------------------------------------------------------------------------------- the default


def test_the_default_follows_the_width_that_the_head_reads() -> None:
    """Of RemBERT, not its hidden size: its head reads hidden states of `output_embedding_size`."""
    sizes = {"hidden_size": 16, "output_embedding_size": 64, "input_embedding_size": 8, "intermediate_size": 16}
    config = RemBertConfig(
        vocab_size=80, num_hidden_layers=1, num_attention_heads=2, is_decoder=True, pad_token_id=0, **sizes
    )
    for options in ({}, {"num_mixtures": 2}, {"shortlist_size": None}):
        model = MoSForCausalLM.from_causal_lm(RemBertForCausalLM(config), **options)
        assert model.config.latent_scale == model.mos_head.latent_scale == 320 / 64
    assert MoSForCausalLM.from_causal_lm(RemBertForCausalLM(config), latent_scale=2.0).config.latent_scale == 2


@pytest.mark.parametrize(("width", "scale"), [(32, 10.0), (128, 2.5), (576, 320 / 576)])
def test_the_default_falls_with_the_width(width: int, scale: float) -> None:
    assert default_scale(width) == pytest.approx(scale)
    assert default_scale(width, from_scratch=True) == pytest.approx(scale / 100)


def test_a_new_model_writes_the_default_to_its_config() -> None:
    config = MoSConfig.from_backbone_config(tiny_causal_lm().config)
    assert config.latent_scale is None
    made = MoSForCausalLM(config)
    assert made.config.latent_scale == made.mos_head.latent_scale == 3.2 / 32  # from scratch
    assert MoSForCausalLM.from_causal_lm(tiny_causal_lm(), latent_scale=None).config.latent_scale == 320 / 32


def test_the_spread_of_the_prior_does_not_depend_on_the_scale() -> None:
    hidden = torch.randn(2000, 32)
    for scale in (0.5, 20.0):
        torch.manual_seed(0)
        model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(), num_mixtures=64, latent_scale=scale)
        assert model.lm_head.prior_logits(hidden).std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "10", True])
def test_a_scale_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match="latent_scale: expected a finite number above 0"):
        MoSConfig.from_backbone_config(LlamaConfig(), latent_scale=value)
