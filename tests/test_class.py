"""Checks that the mixture is the softmax model's own class, so that generic code gets what the softmax model gives."""

import copy
import inspect
import json
import multiprocessing
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import (
    BACKBONES,
    HEADS,
    VOCAB_SIZE,
    WITH_ATTENTION,
    greedy,
    log_prob_gap,
    random_tokens,
    run_python,
    tiny_causal_lm,
    tiny_mos,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import hf_mos
from hf_mos import MoSConfig, MoSForCausalLM
from hf_mos.remote_code import modeling_mos

NAMES = [*BACKBONES, "bert", "cohere", "gpt_neox"]
TOKENS = random_tokens()


def both(name: str, **fields: Any) -> tuple[PreTrainedModel, MoSForCausalLM]:
    softmax = tiny_causal_lm(name, **fields)
    return softmax, MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), num_mixtures=3)


# ----------------------------------------------------------------------------------------------------------- the class


@pytest.mark.parametrize("name", NAMES)
def test_is_the_softmax_models_class(name: str) -> None:
    softmax, model = both(name)
    made, given = type(model), type(softmax)
    assert isinstance(model, MoSForCausalLM)
    assert isinstance(model, given)
    assert made.__name__ == made.__qualname__ == f"MoS{given.__name__}"
    for place in (hf_mos, modeling_mos):
        assert getattr(place, made.__name__) is made
    assert type(tiny_mos(name, seed=1)) is made
    assert isinstance(model.config, MoSConfig)
    assert isinstance(model.config, type(softmax.config))
    assert model.base_model_prefix == softmax.base_model_prefix
    assert type(model.base_model) is type(softmax.base_model)


def test_names_that_are_no_causal_lm() -> None:
    for name in ("MoSNobody", "MoSLlamaModel", "LlamaForCausalLM", "MoSForNobody"):
        with pytest.raises(AttributeError, match=name):
            getattr(hf_mos, name)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_load_or_make_one_gives_the_class(name: str, head: dict[str, Any], tmp_path: Path) -> None:
    softmax, model = both(name)[0], tiny_mos(name, **head)
    made: Any = type(model)
    softmax.save_pretrained(tmp_path / "softmax")
    model.save_pretrained(tmp_path / "mixture")
    loads: list[Callable[[], Any]] = [
        lambda: MoSForCausalLM.from_pretrained(tmp_path / "mixture"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "mixture"),
        lambda: made.from_pretrained(tmp_path / "mixture"),
    ]
    for load in loads:
        loaded = load()
        assert type(loaded) is made
        assert log_prob_gap(loaded, model, input_ids=TOKENS) == 0
    converts: list[Callable[..., Any]] = [
        lambda **options: MoSForCausalLM.from_causal_lm(softmax, **options),
        lambda **options: MoSForCausalLM.from_causal_lm(tmp_path / "softmax", **options),
        lambda **options: MoSForCausalLM.from_pretrained(tmp_path / "softmax", **options),
    ]
    for convert in converts:
        converted = convert(num_mixtures=3, **head)
        assert type(converted) is made
        assert (converted.mos_head.num_mixtures, converted.mos_head.shortlist_size) == (3, head["shortlist_size"])
        assert log_prob_gap(converted, softmax, input_ids=TOKENS) <= 1e-5
    config = model.config
    makes: list[Callable[[Any], Any]] = [MoSForCausalLM, made, AutoModelForCausalLM.from_config, made._from_config]
    for make in makes:
        new = make(copy.deepcopy(config))
        assert type(new) is made
        assert new.state_dict().keys() == model.state_dict().keys()
        assert new(TOKENS).logits.exp().sum(-1).sub(1).abs().max() < 1e-4


def test_a_softmax_folder_is_converted(tmp_path: Path) -> None:
    tiny_causal_lm().save_pretrained(tmp_path)
    for loader in (MoSForCausalLM, hf_mos.MoSLlamaForCausalLM):
        assert type(loader.from_pretrained(tmp_path)) is hf_mos.MoSLlamaForCausalLM
    with pytest.raises(ValueError, match="expected a GPT2LMHeadModel, given a LlamaForCausalLM"):
        hf_mos.MoSGPT2LMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_causal_lm"):
        MoSConfig.from_pretrained(tmp_path)


def test_a_made_class_loads_no_mixture_of_another(tmp_path: Path) -> None:
    tiny_mos("gpt2").save_pretrained(tmp_path)
    refusal = "expected the checkpoint of a MoSLlamaForCausalLM, given that of a MoSGPT2LMHeadModel"
    for given in ({}, {"config": MoSConfig.from_pretrained(tmp_path)}):
        with pytest.raises(ValueError, match=refusal):
            hf_mos.MoSLlamaForCausalLM.from_pretrained(tmp_path, **given)


def test_a_config_without_a_backbone_is_refused() -> None:
    for call in (MoSConfig, lambda: MoSConfig(num_mixtures=3)):
        with pytest.raises(ValueError, match="from_backbone_config"):
            call()
    with pytest.raises(ValueError, match=r"config: expected MoSConfig\.from_backbone_config.*, given LlamaConfig"):
        MoSForCausalLM(tiny_causal_lm().config)
    with pytest.raises(ValueError, match="config: expected the config of a causal LM with a softmax head"):
        MoSConfig.from_backbone_config(tiny_mos().config)


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_the_backbones_with_our_fields(name: str, tmp_path: Path) -> None:
    softmax, model = both(name)
    model_type = softmax.config.model_type
    assert model.config.model_type == type(model.config).model_type == model_type
    ours, theirs = model.config.to_dict(), softmax.config.to_dict()
    own = {"num_mixtures", "shortlist_size", "shift_rank", "latent_scale", "init_seed"}
    assert own <= ours.keys()
    changed = {"architectures", "transformers_version", "final_logit_softcapping", "dtype"}
    assert {key: ours[key] for key in theirs.keys() - changed} == {key: theirs[key] for key in theirs.keys() - changed}
    model.config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["model_type"], content["backbone_model_type"]) == ("mos", model_type)
    assert "text_config" not in content
    if hasattr(softmax.config, "final_logit_softcapping"):
        assert content["final_logit_softcapping"] == softmax.config.final_logit_softcapping
    config = AutoConfig.from_pretrained(tmp_path, num_mixtures=5)
    assert type(config) is type(model.config)
    assert (config.model_type, config.num_mixtures, config.shortlist_size) == (model_type, 5, 64)


def fields_of(config: Any) -> list[str]:
    return [name for name, value in vars(config).items() if not name.startswith("_") and type(value) is float]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_number_of_the_backbone_can_be_given_to_from_pretrained(name: str, tmp_path: Path) -> None:
    softmax, model = both(name)
    model.config.save_pretrained(tmp_path)
    for field in set(fields_of(softmax.config)) - {"final_logit_softcapping"}:
        value = getattr(softmax.config, field)
        loaded = AutoConfig.from_pretrained(tmp_path, **{field: value / 2})
        assert getattr(loaded, field) == value / 2
        assert getattr(MoSConfig.from_dict(json.loads(loaded.to_json_string())), field) == value / 2
        made = MoSConfig.from_backbone_config(softmax.config)
        setattr(made, field, value / 2)
        assert getattr(made, field) == value / 2
        assert getattr(softmax.config, field) == value


# --------------------------------------------------------------------------------------------- copies, pickles, spawns


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name: str, head: dict[str, Any]) -> None:
    model = tiny_mos(name, **head)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert log_prob_gap(twin, model, input_ids=TOKENS) == 0
        assert (twin.get_output_embeddings().weight is twin.get_input_embeddings().weight) is tied
        assert twin.mos_head.shift.weight is not model.mos_head.shift.weight
        losses = [candidate.train()(TOKENS, labels=TOKENS).loss for candidate in (twin, model)]
        assert torch.equal(*losses)
        model.eval()
    for twin in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert type(twin) is type(model.config)
        assert twin.to_dict() == model.config.to_dict()


def test_a_whole_model_is_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    """By nothing but torch.load: the class is found by its name."""
    expected = {}
    for name in NAMES:
        model = tiny_mos(name)
        torch.save(model, tmp_path / f"{name}.pt")
        torch.save(model.config, tmp_path / f"{name} config.pt")
        expected[name] = greedy(model, TOKENS, 4).tolist()
    code = """
import json, torch
root, names, tokens = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
generated = {}
for name in names:
    config = torch.load(f"{root}/{name} config.pt", weights_only=False)
    model = torch.load(f"{root}/{name}.pt", weights_only=False)
    assert type(config) is type(model.config)
    generated[name] = model.generate(torch.tensor(tokens), max_new_tokens=4, do_sample=False).tolist()
print(json.dumps(generated))
"""
    arguments = (tmp_path, json.dumps(NAMES), json.dumps(TOKENS.tolist()))
    assert json.loads(run_python(code, *arguments, cache=tmp_path, without_hf_mos=False)) == expected


def test_a_spawned_process_gets_the_model() -> None:
    model = tiny_mos()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        generate = operator.methodcaller("generate", TOKENS, max_new_tokens=4, do_sample=False)
        generated = pool.apply(generate, (model,))
    assert torch.equal(generated, greedy(model, TOKENS, 4))


@pytest.mark.slow
def test_a_spawned_worker_of_a_data_loader_gets_the_model() -> None:
    model = tiny_mos()
    rows: Any = [model]
    loader = DataLoader(
        rows, num_workers=1, batch_size=None, multiprocessing_context="spawn", collate_fn=operator.attrgetter("config")
    )
    (config,) = loader
    assert type(config) is type(model.config)
    assert config.to_dict() == model.config.to_dict()


# --------------------------------------------------------------------------------- the softmax model's classes load it


def old_folder(folder: Path) -> Path:
    """What the version before this one saved: a config within the config, and other names of the weights."""
    softmax = tiny_causal_lm()
    softmax.save_pretrained(folder)
    text_config = json.loads((folder / "config.json").read_text())
    config = {
        "architectures": ["MoSForCausalLM"],
        "model_type": "mos",
        "text_config": text_config,
        "num_mixtures": 4,
        "shift_rank": 32,
        "latent_scale": 10.0,
        "init_seed": 0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "loader",
    [
        AutoConfig.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        MoSConfig.from_pretrained,
        MoSForCausalLM.from_pretrained,
        MoSForCausalLM.from_causal_lm,
    ],
)
def test_a_folder_of_the_last_version_is_refused(loader: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="backbone_model_type: expected a model type that transformers knows, given N"
    ):
        loader(old_folder(tmp_path))


def test_the_softmax_models_class_loads_the_layers(tmp_path: Path) -> None:
    """Or it refuses the folder by name; random layers with a warning are neither."""
    model = tiny_mos()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    loaders: list[Callable[..., Any]] = [
        LlamaForCausalLM.from_pretrained,
        LlamaModel.from_pretrained,
        AutoModel.from_pretrained,
        lambda folder: AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3),
        transformers.LlamaForTokenClassification.from_pretrained,
    ]
    for load in loaders:
        try:
            loaded = load(tmp_path)
        except ValueError as error:
            assert "MoS" in str(error)  # noqa: PT017
            continue
        layers = loaded.base_model.state_dict()
        assert layers.keys() == {key.removeprefix("model.") for key in saved if key.startswith("model.")}
        for key, tensor in layers.items():
            assert torch.equal(tensor, saved[f"model.{key}"]), key
        if isinstance(loaded, LlamaForCausalLM):
            assert torch.equal(loaded.lm_head.weight, saved["lm_head.weight"])


# -------------------------------------------------------------------------------------------- the arguments of forward


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_is_the_softmax_models(name: str) -> None:
    softmax, model = both(name)
    twins = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), MoSForCausalLM(model.config)]
    for twin in twins:
        assert inspect.signature(twin.forward) == inspect.signature(softmax.forward)
        assert inspect.signature(type(twin).forward) == inspect.signature(type(softmax).forward)
        assert twin.forward.__self__ is twin
        assert "forward" not in vars(twin)


@pytest.mark.parametrize("name", BACKBONES)
def test_arguments_by_position(name: str) -> None:
    softmax, model = both(name)
    values = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}
    names = list(inspect.signature(softmax.forward).parameters)
    arguments = [values.get(each) for each in names[: names.index("labels") + 1]]
    with torch.no_grad():
        expected, given = (candidate(*arguments).loss for candidate in (softmax, model))
        torch.testing.assert_close(given, expected)
        for candidate in (softmax, model):
            with pytest.raises(TypeError):
                candidate(*[None] * (len(names) + 1))
            with pytest.raises(TypeError):
                candidate(TOKENS, input_ids=TOKENS)


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
    "return_dict": True,
    "labels": TOKENS,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_argument_reaches_the_layers(name: str) -> None:
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_cache_of_a_call_with_labels_is_the_softmax_models(name: str, training: bool) -> None:
    for inputs in ({"labels": TOKENS}, {"labels": TOKENS, "use_cache": False}, {"use_cache": True}):
        softmax, model = (candidate.train(training) for candidate in both(name))
        expected, given = (candidate(TOKENS, **inputs) for candidate in (softmax, model))
        for field in ("past_key_values", "cache_params"):
            assert (given.get(field) is None) == (expected.get(field) is None)


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


def test_labels_of_any_shape_that_flattens() -> None:
    """As the softmax model's loss does, which pairs them with flattened logits."""
    softmax, model = both("llama")
    for tokens, labels in ((TOKENS[:1], TOKENS[0]), (TOKENS, TOKENS.flatten()), (TOKENS[:1], TOKENS[:1, None])):
        for candidate in (model.eval(), model.train()):
            loss = candidate(tokens, labels=labels).loss
            torch.testing.assert_close(loss, softmax(tokens, labels=labels).loss)
    with pytest.raises(ValueError, match="targets: expected"):
        model(TOKENS, labels=TOKENS[:, 1:])


@pytest.mark.parametrize("count", [0.5, 3, torch.tensor(0.25), torch.tensor(7)])
def test_a_given_number_of_items_divides_as_it_is(count: Any) -> None:
    softmax, model = both("llama")
    for candidate in (model.eval(), model.train()):
        loss = candidate(TOKENS, labels=TOKENS, num_items_in_batch=count).loss
        torch.testing.assert_close(loss, softmax(TOKENS, labels=TOKENS, num_items_in_batch=count).loss)


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


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_an_assigned_loss_function_is_used(head: dict[str, Any]) -> None:
    def focal(logits: Tensor, labels: Tensor, vocab_size: int, gamma: float = 1.0, **kwargs: Any) -> Tensor:
        nll = F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].flatten(), reduction="none")
        return ((1 - (-nll).exp()) ** gamma * nll).sum() / kwargs.get("num_items_in_batch", 1)

    softmax = tiny_causal_lm()
    model = MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), num_mixtures=3, **head)
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


def test_the_trainer_keeps_the_columns_that_the_softmax_model_takes(tmp_path: Path) -> None:
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


# -------------------------------------------------------------------------------------------- what the config asks for


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


def test_conversion_is_exact_with_outputs_that_the_config_asks_for() -> None:
    softmax, model = both("llama", output_hidden_states=True)
    assert log_prob_gap(softmax, model, input_ids=TOKENS) < 1e-5


@pytest.mark.parametrize("without_hf_mos", [True, False])
def test_implementations_that_can_be_set(without_hf_mos: bool, tmp_path: Path) -> None:
    """transformers reads the source of a class's module to decide; here in a process that met no softmax class."""
    code = """
import json
if "hf_mos" not in sys.modules:
    import hf_mos
from transformers import AutoModelForCausalLM
found = []
for name in ("mixtral", "gpt2"):
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    can_set = type(model)._can_set_attn_implementation(), type(model)._can_set_experts_implementation()
    found.append([*can_set, model.config._attn_implementation, model.config._experts_implementation])
    model.set_attn_implementation("eager")
    found[-1].append(model.config._attn_implementation)
print(json.dumps(found))
"""
    results = []
    for make in (tiny_mos, tiny_causal_lm):
        folder = tmp_path / make.__name__
        for name in ("mixtral", "gpt2"):
            make(name).save_pretrained(folder / name)
        results.append(json.loads(run_python(code, folder, cache=tmp_path, without_hf_mos=without_hf_mos)))
    assert results[0] == results[1]


# ------------------------------------------------------------------------------------------- attributes and submodules

# What names the class, its config or the head.
OWN_ATTRIBUTES = {
    "all_tied_weights_keys",
    "config",
    "config_class",
    "dummy_inputs",
    "fsdp_plan",
    "lm_head",
    "loss_type",
    "tp_plan",
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_every_public_attribute_is_the_softmax_models(name: str) -> None:
    softmax, model = both(name)
    for each in {each for each in dir(softmax) if not each.startswith("_")} - OWN_ATTRIBUTES:
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


@pytest.mark.parametrize("name", NAMES)
def test_the_inputs_of_the_head(name: str) -> None:
    softmax, model = both(name)
    seen = []
    hook = softmax.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        softmax(TOKENS)
        given = model.head_inputs(input_ids=TOKENS)
        hook.remove()
        torch.testing.assert_close(model(TOKENS).logits, model.mos_head(given))
        assert torch.equal(model(hidden_states=given).logits, model(TOKENS).logits)
        loss = model(TOKENS, labels=TOKENS).loss
        torch.testing.assert_close(model(hidden_states=given, labels=TOKENS).loss, loss)
    assert given.shape == (2, 12, 32)
    if name != "cohere":  # its logits are scaled, so that the mixture reads scaled hidden states
        assert torch.equal(given, seen[0])


def test_hidden_states_take_no_other_input() -> None:
    model = tiny_mos()
    hidden = model.head_inputs(input_ids=TOKENS)
    with pytest.raises(ValueError, match="hidden_states: expected no input_ids with it"):
        model(TOKENS, hidden_states=hidden)


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
    assert model(input_ids=TOKENS, labels=TOKENS, skip_logits=False).logits.shape == (2, 12, VOCAB_SIZE)


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
    with pytest.raises(RuntimeError, match=r"model\.skip_logits_in_training = False"):
        OwnLoss(model, arguments, train_dataset=rows).train()
    model.skip_logits_in_training = False
    trainer = OwnLoss(model, arguments, train_dataset=rows)
    trainer.train()
    expected = softmax(input_ids=TOKENS, labels=TOKENS).loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), abs=1e-4)


@pytest.mark.parametrize("name", ["DeepseekV4Config", "LlamaConfig", "GPT2Config"])
def test_what_the_file_alone_says_is_in_no_config(tmp_path: Path, name: str) -> None:
    """Also where a config class sets all that it is given, as DeepSeek's does: its type decides how weights load."""
    config = MoSConfig.from_backbone_config(getattr(transformers, name)())
    file = tmp_path / "config.json"
    config.to_json_file(file)
    read = [cls.from_json_file(file) for cls in (MoSConfig, type(config))]
    for loaded in [MoSConfig.from_dict(json.loads(config.to_json_string())), *read]:
        assert type(loaded) is type(config)
        assert loaded.model_type == config.model_type != "mos"
        assert not {"backbone_model_type", "tokenizer_without_code"} & vars(loaded).keys()
