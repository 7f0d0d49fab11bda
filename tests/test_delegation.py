"""Checks that generic code which talks to the mixture gets what the softmax model, its backbone, would give."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKBONES, WITH_ATTENTION, log_prob_gap, random_tokens, tiny_causal_lm, tiny_mos
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_mos import MoSConfig, MoSForCausalLM
from hf_mos.configuration_mos import SOFTCAP_FIELDS

TOKENS = random_tokens()
# These describe the checkpoint or the head, which are the mixture's own.
OWN = {"architectures", "dtype", "return_dict", "tie_word_embeddings", "transformers_version", *SOFTCAP_FIELDS}
OWN |= {"base_model_tp_plan"}  # of the names of modules; older transformers keeps it in the config itself
OWN_ATTRIBUTES = {
    "all_tied_weights_keys", "base_model_prefix", "can_record_outputs", "config", "dummy_inputs", "ep_plan",
    "fsdp_plan", "loss_type", "pp_plan", "tp_plan",
}  # fmt: skip


def both(name: str, **fields: Any) -> tuple[PreTrainedModel, MoSForCausalLM]:
    softmax = tiny_causal_lm(name, **fields)
    return softmax, MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), num_mixtures=3)


def fields_of(config: PreTrainedConfig) -> list[str]:
    return [name for name in vars(config) if not name.startswith("_") and name not in OWN] + ["output_attentions"]


# ------------------------------------------------------------------------------------------------ fields of the config


@pytest.mark.parametrize("name", BACKBONES)
def test_every_field_is_read_from_the_backbone(name: str) -> None:
    softmax, model = both(name)
    fields = fields_of(softmax.config)
    assert len(fields) > 15
    for field in [*fields, *softmax.config.attribute_map]:
        assert getattr(model.config, field) == getattr(softmax.config, field), field
    assert not hasattr(model.config, "no_such_field")


@pytest.mark.parametrize("name", BACKBONES)
def test_every_field_is_set_in_the_backbone(name: str) -> None:
    softmax, model = both(name)
    for field in fields_of(softmax.config):
        value = getattr(softmax.config, field)
        if field == "output_attentions":
            model.set_attn_implementation("eager")
        new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value
        setattr(model.config, field, new)
        assert getattr(model.backbone.config, field) == getattr(model.config, field) == new, field
        assert field not in vars(model.config)
        setattr(model.config, field, value)
    model.config.of_nobody = 3
    assert model.config.of_nobody == 3
    assert not hasattr(model.backbone.config, "of_nobody")


@pytest.mark.parametrize("name", BACKBONES)
def test_every_number_can_be_given_to_from_pretrained_and_to_the_constructor(name: str, tmp_path: Path) -> None:
    softmax, model = both(name)
    model.config.save_pretrained(tmp_path)
    for field in fields_of(softmax.config):
        value = getattr(softmax.config, field)
        if type(value) is not float:
            continue
        loaded = AutoConfig.from_pretrained(tmp_path, **{field: value / 2})
        made = MoSConfig(text_config=copy.deepcopy(softmax.config), **{field: value / 2})
        for config in (loaded, made):
            assert getattr(config.text_config, field) == getattr(config, field) == value / 2
            assert getattr(MoSConfig.from_dict(config.to_dict()), field) == value / 2
        assert getattr(softmax.config, field) == value


def test_fields_of_a_config_within_the_backbones() -> None:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = MoSConfig(text_config=Gemma3Config(text_config=text, image_token_index=7))
    inner = config.text_config.text_config
    assert (config.hidden_size, config.image_token_index) == (32, 7)
    config.attention_dropout, config.image_token_index, config.output_hidden_states = 0.5, 8, True
    assert (inner.attention_dropout, config.text_config.image_token_index) == (0.5, 8)
    assert config.text_config.output_hidden_states  # the outer model reads its own
    assert not inner.output_hidden_states


@pytest.mark.parametrize("how", ["config", "argument", "model"])
@pytest.mark.parametrize("output", ["hidden_states", "attentions"])
def test_outputs_that_the_config_asks_for(output: str, how: str, tmp_path: Path) -> None:
    softmax, model = both("llama")
    asks: dict[str, Any] = {f"output_{output}": True}
    for candidate in (softmax, model):
        candidate.set_attn_implementation("eager")
    if how == "config":
        setattr(softmax.config, f"output_{output}", True)
        model = MoSForCausalLM.from_causal_lm(softmax)
    elif how == "argument":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **asks)
    else:
        setattr(model.config, f"output_{output}", True)
    with torch.no_grad():
        given = getattr(model(input_ids=TOKENS), output)
        expected = getattr(softmax(input_ids=TOKENS, **asks), output)
    assert len(given) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))


def test_the_router_loss_that_the_config_asks_for() -> None:
    softmax, model = both("mixtral")
    for candidate in (softmax, model):
        candidate.config.output_router_logits = True
    expected, given = (candidate(input_ids=TOKENS, labels=TOKENS) for candidate in (softmax, model))
    torch.testing.assert_close(given.aux_loss, expected.aux_loss)
    torch.testing.assert_close(given.loss, expected.loss)
    for candidate in (softmax, model):
        candidate.router_aux_loss_coef = 3.0
    expected, given = (candidate(input_ids=TOKENS, labels=TOKENS).loss for candidate in (softmax, model))
    torch.testing.assert_close(given, expected)


# -------------------------------------------------------------------------------------------- the arguments of forward


@pytest.mark.parametrize("name", BACKBONES)
def test_the_signature_is_the_backbones(name: str) -> None:
    softmax, model = both(name)
    twins = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), MoSForCausalLM(model.config)]
    *expected, rest = inspect.signature(softmax.forward).parameters.values()
    for twin in twins:
        *given, last = inspect.signature(twin.forward).parameters.values()
        assert given[: len(expected)] == expected
        assert last.kind == rest.kind == inspect.Parameter.VAR_KEYWORD
        assert twin.forward.__self__ is twin


@pytest.mark.parametrize("name", BACKBONES)
def test_arguments_by_position(name: str) -> None:
    softmax, model = both(name)
    values = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}
    names = list(inspect.signature(softmax.forward).parameters)
    arguments = [values.get(each) for each in names[: names.index("labels") + 1]]
    with torch.no_grad():
        expected, given = (candidate(*arguments).loss for candidate in (softmax, model))
        torch.testing.assert_close(given, expected)
        with pytest.raises(TypeError, match=r"expected at most \d+ positional arguments"):
            model(*[None] * (len(names) + 1))
        with pytest.raises(TypeError, match="input_ids"):
            model(TOKENS, input_ids=TOKENS)


VALUES = {
    "attention_mask": (torch.arange(12) < 9).long().expand(2, -1),
    "position_ids": torch.arange(12).flip(0).expand(2, -1),
    "token_type_ids": torch.ones_like(TOKENS),
    "inputs_embeds": torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0)),
    "use_cache": False,
    "output_router_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "logits_to_keep": 2,
    "labels": TOKENS,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_argument_reaches_the_backbone(name: str) -> None:
    softmax, model = both(name)
    named = [each for each in inspect.signature(softmax.forward).parameters if each in VALUES]
    assert len(named) >= 5
    for argument in [*named, "output_hidden_states"]:
        inputs: dict[str, Any] = {argument: VALUES[argument]}
        if argument != "inputs_embeds":
            inputs["input_ids"] = TOKENS
        with torch.no_grad():
            expected, given = (candidate(**inputs) for candidate in (softmax, model))
        assert list(given.keys()) == list(expected.keys()), argument
        torch.testing.assert_close(given.logits, expected.logits.float().log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", [5, 96])
def test_ignore_index(pad: int) -> None:
    softmax, model = both("llama")
    labels = TOKENS.masked_fill(TOKENS % 3 == 0, pad)
    for divisor in (None, 7):
        inputs = {"input_ids": TOKENS, "num_items_in_batch": divisor}
        expected = softmax(**inputs, labels=labels, ignore_index=pad).loss
        masked = model(**inputs, labels=labels.masked_fill(labels == pad, -100)).loss
        for candidate in (model.eval(), model.train()):
            torch.testing.assert_close(candidate(**inputs, labels=labels, ignore_index=pad).loss, expected)
        torch.testing.assert_close(masked, expected)
    shifted = F.pad(labels, (0, 1), value=pad)[:, 1:].contiguous()
    expected = softmax(input_ids=TOKENS, labels=labels, shift_labels=shifted, ignore_index=pad).loss
    torch.testing.assert_close(
        model(input_ids=TOKENS, labels=labels, shift_labels=shifted, ignore_index=pad).loss, expected
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtypes_of_labels(dtype: torch.dtype) -> None:
    model = tiny_mos()
    expected = model(input_ids=TOKENS, labels=TOKENS).loss
    for candidate in (model.eval(), model.train()):
        torch.testing.assert_close(candidate(input_ids=TOKENS, labels=TOKENS.to(dtype)).loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_labels_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"labels: expected integer class indices, given torch\."):
        tiny_mos()(input_ids=TOKENS, labels=TOKENS.to(dtype))


def test_an_assigned_loss_function_is_used() -> None:
    def focal(logits: Tensor, labels: Tensor, vocab_size: int, gamma: float = 1.0, **kwargs: Any) -> Tensor:
        nll = F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].flatten(), reduction="none")
        return ((1 - (-nll).exp()) ** gamma * nll).sum() / kwargs.get("num_items_in_batch", 1)

    softmax, model = both("llama")
    for options in ({}, {"gamma": 2.0}, {"num_items_in_batch": 5}):
        losses = []
        for candidate in (softmax, model.eval(), model.train()):
            candidate.loss_function = focal
            losses.append(candidate(input_ids=TOKENS, labels=TOKENS, **options).loss)
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(losses[2], losses[0])
    model.loss_function = ForCausalLMLoss
    torch.testing.assert_close(
        model(input_ids=TOKENS, labels=TOKENS).loss, tiny_causal_lm()(input_ids=TOKENS, labels=TOKENS).loss
    )


def test_the_trainer_keeps_the_columns_that_the_backbone_takes(tmp_path: Path) -> None:
    rows = [
        {"input_ids": row, "labels": row, "token_type_ids": torch.arange(12) % 5, "of_nobody": 1} for row in TOKENS
    ]
    losses = []
    for model in both("gpt2"):
        model.loss_type = "ForCausalLM"  # else transformers divides gpt2's loss by all labels
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2, max_steps=1, logging_steps=1, report_to="none", use_cpu=True
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    plain = tiny_causal_lm("gpt2")(input_ids=TOKENS, labels=TOKENS).loss
    assert abs(float(plain.detach()) - losses[0]) > 0.01  # the column matters


# ------------------------------------------------------------------------------------------- attributes and submodules


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", BACKBONES)
def test_every_public_attribute_is_there(name: str) -> None:
    softmax, model = both(name)
    names = {each for each in dir(softmax) if not each.startswith("_")} - OWN_ATTRIBUTES - {"backbone", "lm_head"}
    for each in names:
        if not hasattr(softmax, each):
            continue
        theirs, ours = getattr(softmax, each), getattr(model, each)
        if callable(theirs):
            assert callable(ours), each
        else:
            assert ours == theirs, each
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_base_model_returns_the_last_hidden_states(name: str) -> None:
    softmax, model = both(name)
    with torch.no_grad():
        expected, given = (candidate.base_model(TOKENS).last_hidden_state for candidate in (softmax, model))
    assert torch.equal(given, expected)


def test_an_attribute_of_the_backbone_is_set_there() -> None:
    model = tiny_mos("mixtral")
    model.num_experts = 7
    assert model.backbone.num_experts == 7
    model.of_nobody = 7
    assert not hasattr(model.backbone, "of_nobody")
    model.extra = nn.Linear(2, 2)
    assert "extra.weight" in model.state_dict()


# ------------------------------------------------------------------------------------------- logits that were left out

READINGS = [
    lambda logits, _: logits.shape,
    lambda logits, _: logits[..., :-1, :],
    lambda logits, _: logits.float(),
    lambda logits, _: logits / 0.7,
    lambda logits, _: 0.5 * logits,
    lambda logits, _: torch.softmax(logits, -1),
    lambda logits, labels: F.cross_entropy(logits, labels),
]


@pytest.mark.parametrize("reading", READINGS)
def test_logits_left_out_in_training_say_how_to_get_them(reading: Any) -> None:
    model = tiny_mos().train()
    for logits in (
        model(input_ids=TOKENS, labels=TOKENS).logits,
        model(input_ids=TOKENS, labels=TOKENS, return_dict=False)[1],
    ):
        with pytest.raises(RuntimeError, match=r"logits: expected skip_logits=False in the call"):
            reading(logits, TOKENS)
    assert model(input_ids=TOKENS, labels=TOKENS, skip_logits=True).logits is None
    assert model(input_ids=TOKENS, labels=TOKENS, skip_logits=False).logits.shape == (2, 12, 97)


def test_a_loss_of_the_users_own_that_reads_logits(tmp_path: Path) -> None:
    class OwnLoss(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
            return (loss, outputs) if return_outputs else loss

    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=1, logging_steps=1, report_to="none", use_cpu=True
    )
    softmax, model = both("llama")
    with pytest.raises(RuntimeError, match=r"skip_logits_in_training=False in its config"):
        OwnLoss(model, arguments, train_dataset=rows).train()
    model.config.skip_logits_in_training = False
    trainer = OwnLoss(model, arguments, train_dataset=rows)
    trainer.train()
    expected = softmax(input_ids=TOKENS, labels=TOKENS).loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), abs=1e-4)


def test_conversion_is_exact_with_outputs_that_the_config_asks_for() -> None:
    softmax, model = both("llama", output_hidden_states=True)
    assert log_prob_gap(softmax, model, input_ids=TOKENS) < 1e-5
