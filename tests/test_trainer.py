"""Checks what the Trainer requires of a model: loss, normalisation, precision, checkpoints and evaluation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import cases
from helpers import BACKBONES, HEADS, VOCAB_SIZE, LargestTensor, logged_losses, random_tokens, tiny_causal_lm, tiny_mos
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_mos import MoSForCausalLM

# What newer releases of transformers call gradient checkpointing.
IS_RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if IS_RENAMED else "gradient_checkpointing"


def rows(count: int = 16, length: int = 12, ignored: bool = False) -> list[dict[str, Tensor]]:
    """Training rows; with `ignored`, each row has another number of labels that count."""
    tokens = random_tokens(count, length)
    labels = tokens.clone()
    if ignored:
        for i in range(count):
            labels[i, : i % (length - 1)] = -100
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


def trainer(model: MoSForCausalLM, folder: Path, data: list | None = None, **options: Any) -> Trainer:
    names = ("compute_metrics", "preprocess_logits_for_metrics", "data_collator", "callbacks")
    parts = {name: options.pop(name) for name in names if name in options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    data = rows() if data is None else data
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, **parts)


def parameters(model: MoSForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "head"),
    cases(BACKBONES, HEADS, quick=[("llama", HEADS[0]), ("llama-tied", HEADS[1]), ("mixtral", HEADS[1])]),
)
def test_trains(name: str, head: dict, tmp_path: Path) -> None:
    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(name), num_mixtures=3, **head)
    before = parameters(model)
    run = trainer(model, tmp_path, max_steps=20, learning_rate=3e-3, lr_scheduler_type="constant")
    run.train()
    assert logged_losses(run)[-1] < 0.8 * logged_losses(run)[0]
    changed = {key for key, weight in parameters(model).items() if not torch.equal(before[key], weight)}
    assert {"lm_head.prior.weight", "lm_head.shift.weight"} <= changed
    assert changed & {key for key, weight in model.named_parameters() if weight is model.lm_head.weight}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_accumulated_gradients_are_those_of_the_large_batch(name: str, tmp_path: Path) -> None:
    data = rows(16, ignored=True)
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = tiny_mos(name)
        run = trainer(
            model,
            tmp_path,
            data,
            optim="sgd",
            learning_rate=0.1,
            max_steps=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            seed=1,
        )
        run.train()
        results.append((parameters(model), logged_losses(run)))
    (large, large_losses), (accumulated, accumulated_losses) = results
    assert accumulated_losses == pytest.approx(large_losses, abs=1e-4)  # the log rounds
    start = parameters(tiny_mos(name))
    for name, weight in large.items():
        torch.testing.assert_close(accumulated[name], weight, atol=1e-6, rtol=0)
    assert any((large[name] - start[name]).abs().max() > 1e-3 for name in large)


@pytest.mark.parametrize("name", BACKBONES)
def test_num_items_in_batch_divides_the_sum(name: str) -> None:
    model = tiny_mos(name).train()
    tokens = random_tokens()
    labels = tokens.clone()
    labels[0, :4] = -100
    count = int((labels[:, 1:] != -100).sum())
    mean = model(input_ids=tokens, labels=labels).loss
    for given in (10, torch.tensor(10)):
        loss = model(input_ids=tokens, labels=labels, num_items_in_batch=given).loss
        torch.testing.assert_close(loss, mean * count / 10)


def test_shift_labels_are_not_shifted_again() -> None:
    model = tiny_mos().train()
    tokens = random_tokens()
    expected = model(input_ids=tokens, labels=tokens).loss
    shifted = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    torch.testing.assert_close(model(input_ids=tokens, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(input_ids=tokens, labels=tokens, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("ignored", [False, True])
def test_label_smoothing_shifts_the_labels(ignored: bool, tmp_path: Path) -> None:
    epsilon = 0.1
    model = tiny_mos()
    data = rows(4, ignored=ignored)
    tokens, labels = (torch.stack([row[key] for row in data]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        log_probs = model(input_ids=tokens).logits[:, :-1]
    targets = labels[:, 1:]
    kept = targets != -100
    nll = F.nll_loss(log_probs[kept], targets[kept])
    expected = (1 - epsilon) * nll - epsilon * log_probs[kept].mean()
    run = trainer(model, tmp_path, data, max_steps=1, label_smoothing_factor=epsilon)
    run.train()
    assert logged_losses(run)[0] == pytest.approx(expected.item(), abs=1e-4)
    run = trainer(tiny_mos(), tmp_path, data, label_smoothing_factor=epsilon)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    tokens = random_tokens()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_mos(name).train()
        if checkpointing:
            getattr(model, f"{CHECKPOINTING}_enable")()
        assert getattr(model, f"is_{CHECKPOINTING}") is checkpointing
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters()})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, atol=1e-6, rtol=1e-5, msg=key)


def test_gradient_checkpointing_in_the_trainer(tmp_path: Path) -> None:
    run = trainer(tiny_mos(), tmp_path, max_steps=2, **{CHECKPOINTING: True})
    run.train()
    plain = trainer(tiny_mos(), tmp_path, max_steps=2)
    plain.train()
    assert logged_losses(run) == pytest.approx(logged_losses(plain), abs=1e-4)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mamba"])
def test_trains_in_bf16(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 20, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    half = trainer(tiny_mos(name), tmp_path, bf16=True, **options)
    half.train()
    single = trainer(tiny_mos(name), tmp_path, **options)
    single.train()
    assert logged_losses(half)[-1] < 0.8 * logged_losses(half)[0]
    assert logged_losses(half)[0] == pytest.approx(logged_losses(single)[0], rel=2e-2)
    assert logged_losses(half) != logged_losses(single)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.float32}


class StopAt(TrainerCallback):
    """Ends the run where an interrupt would; the schedule stays that of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def with_dropout(name: str, seed: int = 0) -> MoSForCausalLM:
    model = tiny_mos(name, seed=seed)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_a_resumed_run_is_bit_identical(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    whole = trainer(with_dropout(name), tmp_path / "whole", **options)
    whole.train()

    first = trainer(with_dropout(name), tmp_path / "parts", callbacks=[StopAt(3)], **options)
    first.train()
    other = with_dropout(name, seed=5)  # everything comes from the checkpoint
    second = trainer(other, tmp_path / "parts", **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    for key, weight in parameters(whole.model).items():
        assert torch.equal(second.model.get_parameter(key), weight), key


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    run = trainer(
        tiny_mos("llama-tied"),
        tmp_path,
        max_steps=2,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=1e-3,
    )
    run.train()
    best = MoSForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    for key, weight in parameters(best).items():
        assert torch.equal(run.model.get_parameter(key), weight), key


@pytest.mark.parametrize("name", BACKBONES)
def test_metrics_get_the_log_probabilities(name: str, tmp_path: Path) -> None:
    model = tiny_mos(name)
    data = rows(6)
    seen = {}

    def compute_metrics(prediction: Any) -> dict[str, float]:
        log_probs, labels = map(torch.as_tensor, prediction)
        seen["shape"] = tuple(log_probs.shape)
        nll = F.nll_loss(log_probs[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"nll": nll.item()}

    metrics = trainer(model, tmp_path, data, compute_metrics=compute_metrics).evaluate()
    assert seen["shape"] == (6, 12, VOCAB_SIZE)
    assert metrics["eval_nll"] == pytest.approx(metrics["eval_loss"], abs=1e-5)


def test_logits_can_be_preprocessed(tmp_path: Path) -> None:
    model, data = tiny_mos(), rows(6)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (6, 12)
        return {"accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    metrics = trainer(
        model,
        tmp_path,
        data,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    ).evaluate()
    tokens = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        expected = (model(tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:]).float().mean()
    assert metrics["eval_accuracy"] == pytest.approx(expected.item())


def test_prediction_loss_only_keeps_no_logits(tmp_path: Path) -> None:
    model = tiny_mos()
    loss_only = trainer(model, tmp_path, prediction_loss_only=True)
    assert loss_only.predict(loss_only.eval_dataset).predictions is None
    everything = trainer(model, tmp_path)
    assert loss_only.evaluate()["eval_loss"] == pytest.approx(everything.evaluate()["eval_loss"])
    assert everything.predict(everything.eval_dataset).predictions.shape == (16, 12, VOCAB_SIZE)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_skip_logits_makes_no_tensor_as_wide_as_the_vocabulary(training: bool, head: dict) -> None:
    vocab_size, batch, length = 30000, 8, 64
    original = tiny_causal_lm(vocab_size=vocab_size)
    model = MoSForCausalLM.from_causal_lm(original, num_mixtures=2, **head).train(training)
    tokens = random_tokens(batch, length)
    with LargestTensor() as largest, torch.set_grad_enabled(training):
        loss = model(input_ids=tokens, labels=tokens, skip_logits=True).loss
    with torch.no_grad():
        torch.testing.assert_close(loss.detach(), original(input_ids=tokens, labels=tokens).loss)
    assert largest.numel < batch * length * vocab_size


def test_evaluation_without_logits_when_the_collator_says_so(tmp_path: Path) -> None:
    vocab_size, batch, length = 30000, 8, 64
    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(vocab_size=vocab_size), num_mixtures=2)
    run = trainer(
        model,
        tmp_path,
        rows(batch, length),
        per_device_eval_batch_size=batch,
        prediction_loss_only=True,
        data_collator=lambda batch: {**default_data_collator(batch), "skip_logits": True},
    )
    with LargestTensor() as largest:
        loss = run.evaluate()["eval_loss"]
    assert largest.numel < batch * length * vocab_size
    assert loss == pytest.approx(trainer(model, tmp_path, rows(batch, length)).evaluate()["eval_loss"], abs=1e-4)


def test_evaluation_computes_the_component_logits_once() -> None:
    """The loss is read from the logits where they are there."""
    model = tiny_mos()
    calls = []
    model.lm_head.shift.register_forward_hook(lambda *_: calls.append(1))
    tokens = random_tokens()
    with torch.no_grad():
        outputs = model(input_ids=tokens, labels=tokens)
        assert len(calls) == 1
        skipped = model(input_ids=tokens, labels=tokens, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(outputs.loss, skipped.loss)


def test_logits_are_skipped_in_training_only_with_labels() -> None:
    tokens = random_tokens()
    model = tiny_mos().train()
    assert model(input_ids=tokens, labels=tokens).logits == ()  # test_class.py checks that it cannot be read
    assert model(input_ids=tokens).logits.shape == (2, 12, VOCAB_SIZE)
    assert model(input_ids=tokens, labels=tokens, skip_logits=False).logits.shape == (2, 12, VOCAB_SIZE)
    model.skip_logits_in_training = False
    assert model(input_ids=tokens, labels=tokens).logits.shape == (2, 12, VOCAB_SIZE)
    assert tiny_mos()(input_ids=tokens, labels=tokens).logits.shape == (2, 12, VOCAB_SIZE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_no_label_that_counts_is_a_zero_loss(name: str, training: bool) -> None:
    model = tiny_mos(name).train(training)
    tokens = random_tokens()
    labels = torch.full_like(tokens, -100)
    for count in (None, 0, torch.tensor(0)):
        loss = model(input_ids=tokens, labels=labels, num_items_in_batch=count).loss
        assert loss.item() == 0
        loss.backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
    with torch.no_grad():
        assert model(input_ids=tokens, labels=labels).loss.item() == 0


def test_a_batch_without_labels_leaves_the_weights(tmp_path: Path) -> None:
    data = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows(4)]
    model = tiny_mos()
    before = parameters(model)
    run = trainer(model, tmp_path, data, max_steps=1, optim="sgd", learning_rate=1.0)
    run.train()
    assert logged_losses(run) == [0.0]
    assert all(torch.equal(before[key], weight) for key, weight in parameters(model).items())


def test_router_loss_of_a_mixture_of_experts_joins_once() -> None:
    original = tiny_causal_lm("mixtral", output_router_logits=True)
    model = MoSForCausalLM.from_causal_lm(original)
    tokens = random_tokens()
    with torch.no_grad():
        expected = original(input_ids=tokens, labels=tokens)
        outputs = model(input_ids=tokens, labels=tokens)
    assert outputs.aux_loss > 0
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_loss_of_the_mixture_is_its_cross_entropy(head: dict) -> None:
    model = tiny_mos(**head)
    tokens = random_tokens()
    outputs = model(input_ids=tokens, labels=tokens)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    assert math.isclose(outputs.logits.exp().sum(-1).mean().item(), 1, abs_tol=1e-5)
