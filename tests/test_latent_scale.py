"""One learning rate for all weights: `latent_scale` does what parameter groups of their own would do for the head."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_causal_lm, tiny_mos
from torch.utils.data import Dataset
from transformers import RemBertConfig, RemBertForCausalLM, Trainer, TrainingArguments

from hf_mos import MoSConfig, MoSForCausalLM

SCALE = 10.0
STEPS, RATE = 6, 1e-2


def pair(**options: Any) -> tuple[MoSForCausalLM, MoSForCausalLM]:
    """The same mixture with a scale, and with a scale of 1."""
    models = [
        MoSForCausalLM.from_causal_lm(tiny_causal_lm(), num_mixtures=3, latent_scale=scale, **options).double()
        for scale in (SCALE, 1.0)
    ]
    with torch.no_grad():
        models[1].lm_head.prior.weight.copy_(SCALE * models[0].lm_head.prior.weight)
    return models[0], models[1]


def groups(model: MoSForCausalLM, head_rate: float) -> list[dict[str, Any]]:
    """Parameter groups, written by hand: the prior and the shifts learn at `head_rate`."""
    new = [model.lm_head.prior.weight, model.lm_head.shift.weight]
    old = [weight for weight in model.parameters() if all(weight is not other for other in new)]
    return [{"params": old, "lr": RATE}, {"params": new, "lr": head_rate}]


def losses_of(model: MoSForCausalLM, optimizer: torch.optim.Optimizer, max_norm: float | None) -> list[float]:
    losses = []
    for step in range(STEPS):
        tokens = random_tokens(4, seed=step % 2)
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-12),
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-12, fused=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, eps=1e-12),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("options", [{}, {"latent_rank": 4}, {"shortlist_size": 20}], ids=str)
def test_equals_parameter_groups_under_every_optimizer(
    name: str, max_norm: float | None, options: dict[str, Any]
) -> None:
    """To the last digits, with clipping too, so that the rest of the model moves as it would without the scale."""
    scaled, plain = pair(**options)
    given = losses_of(scaled, OPTIMIZERS[name]([{"params": [*scaled.parameters()], "lr": RATE}]), max_norm)
    expected = losses_of(plain, OPTIMIZERS[name](groups(plain, SCALE * RATE)), max_norm)
    assert given == pytest.approx(expected, rel=1e-7)
    assert given[-1] < given[0]
    weights = scaled.backbone.state_dict()
    for key, value in plain.backbone.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(SCALE * scaled.lm_head.shift.weight, plain.lm_head.shift.weight, rtol=1e-6, atol=1e-8)


def test_one_rate_differs_from_the_same_rate_without_a_scale() -> None:
    """The comparison above can fail."""
    scaled, plain = pair()
    given = losses_of(scaled, torch.optim.AdamW(scaled.parameters(), lr=RATE), None)
    assert given != pytest.approx(losses_of(plain, torch.optim.AdamW(plain.parameters(), lr=RATE), None), rel=1e-4)


def test_weight_decay_pulls_to_one_softmax() -> None:
    model = tiny_mos()
    hidden = torch.randn(5, 32)
    distances = []
    optimizer = torch.optim.AdamW(model.lm_head.shift.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(3):
        model.lm_head.shift.weight.grad = torch.zeros_like(model.lm_head.shift.weight)
        distances.append((model.lm_head.latents(hidden).dense() - hidden.unsqueeze(1)).norm().item())
        optimizer.step()
    assert distances == pytest.approx([distances[0], 0.9 * distances[0], 0.81 * distances[0]])


class Blocks(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = random_tokens(1, seed=index)[0]
        return {"input_ids": tokens, "labels": tokens}


def test_the_trainer_needs_nothing_else(tmp_path: Path) -> None:
    scaled, plain = (model.float() for model in pair())
    common = {"max_steps": 4, "learning_rate": RATE, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    losses = []
    for name, model in (("scaled", scaled), ("plain", plain)):
        arguments = TrainingArguments(output_dir=str(tmp_path / name), **common)
        trainer = Trainer(model, arguments, train_dataset=Blocks())
        if model is plain:
            optimizer = torch.optim.AdamW(groups(plain, SCALE * RATE), weight_decay=0.0)
            trainer = Trainer(model, arguments, train_dataset=Blocks(), optimizers=(optimizer, None))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # the epsilon of Adam counts more without the scale
    assert losses[0][-1] < losses[0][0]


def test_the_default_follows_the_width_that_the_head_reads() -> None:
    """Of RemBERT, not its hidden size: its head reads hidden states of `output_embedding_size`."""
    sizes = {"hidden_size": 16, "output_embedding_size": 64, "input_embedding_size": 8, "intermediate_size": 16}
    config = RemBertConfig(
        vocab_size=50, num_hidden_layers=1, num_attention_heads=2, is_decoder=True, pad_token_id=0, **sizes
    )
    for options in ({}, {"num_mixtures": 2}, {"latent_rank": 4}):
        model = MoSForCausalLM.from_causal_lm(RemBertForCausalLM(config), **options)
        assert model.config.latent_scale == model.lm_head.latent_scale == 320 / 64
    assert MoSForCausalLM.from_causal_lm(RemBertForCausalLM(config), latent_scale=2.0).config.latent_scale == 2


@pytest.mark.parametrize(("width", "scale"), [(32, 10.0), (128, 2.5), (576, 320 / 576)])
def test_the_default_falls_with_the_width(width: int, scale: float) -> None:
    config = MoSConfig(text_config={"model_type": "llama", "hidden_size": width, "num_attention_heads": 2})
    assert config.latent_scale == pytest.approx(scale)


def test_the_spread_of_the_prior_does_not_depend_on_the_scale() -> None:
    hidden = torch.randn(2000, 32)
    for scale in (0.5, 20.0):
        torch.manual_seed(0)
        model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(), num_mixtures=64, latent_scale=scale)
        assert model.lm_head.prior_logits(hidden).std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("options", [{}, {"latent_rank": 4}], ids=str)
def test_a_checkpoint_of_the_old_form_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    tiny_mos(**options).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["latent_scale"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="latent_scale: expected a number, given none: the checkpoint is of an earlier"
    ):
        MoSForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "10", True])
def test_a_scale_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match="latent_scale: expected a finite number above 0"):
        MoSConfig(text_config={"model_type": "llama"}, latent_scale=value)
    with pytest.raises(ValueError, match="latent_scale: expected 1 or None where the latents are the paper's"):
        MoSConfig(text_config={"model_type": "llama"}, latent_scale=2.0, latent_activation="tanh")


def test_the_papers_latents_stay() -> None:
    config = copy.deepcopy(tiny_causal_lm().config)
    model = MoSForCausalLM(MoSConfig(text_config=config, latent_activation="tanh"))
    assert model.config.latent_scale == 1
    hidden = torch.randn(4, 32)
    expected = torch.tanh(model.lm_head.latent(hidden)).view(4, 4, 32)
    torch.testing.assert_close(model.lm_head.latents(hidden).dense(), expected)
