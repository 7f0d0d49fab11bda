"""Checks conversion: same predictions, shared weights, and components that diverge once trained."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKBONES,
    HEADS,
    VOCAB_SIZE,
    greedy,
    log_prob_gap,
    part_components,
    random_tokens,
    tiny_causal_lm,
)
from torch import Tensor
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    GenerationConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_mos import MoSForCausalLM


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", [*BACKBONES, "bert", "cohere", "gpt_neox"])
def test_predictions_are_those_of_the_causal_lm(name: str, head: dict) -> None:
    original = tiny_causal_lm(name)
    model = MoSForCausalLM.from_causal_lm(original, num_mixtures=4, **head)
    tokens = random_tokens(3, 10)
    assert log_prob_gap(model, original, input_ids=tokens) <= 1e-5
    assert torch.equal(greedy(model, tokens, 16), greedy(original, tokens, 16))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", [*BACKBONES, "bert", "cohere", "gpt_neox"])
def test_loss_is_that_of_the_causal_lm(name: str, head: dict) -> None:
    original = tiny_causal_lm(name)
    model = MoSForCausalLM.from_causal_lm(original, num_mixtures=2, **head)
    tokens = random_tokens()
    labels = tokens.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        expected = original(input_ids=tokens, labels=labels).loss
        torch.testing.assert_close(model(input_ids=tokens, labels=labels).loss, expected)
        torch.testing.assert_close(model.train()(input_ids=tokens, labels=labels).loss, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_an_untied_decoder_can_be_given_to_a_tied_model(name: str, tmp_path: Path) -> None:
    original = tiny_causal_lm("llama-tied" if name == "llama" else name)
    model = MoSForCausalLM.from_causal_lm(original, tie_word_embeddings=False)
    assert log_prob_gap(model, original, input_ids=random_tokens()) <= 1e-5
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is False
    assert not model.all_tied_weights_keys
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    loaded = MoSForCausalLM.from_pretrained(tmp_path)
    assert log_prob_gap(loaded, model, input_ids=random_tokens()) == 0
    for untied in (loaded, MoSForCausalLM(loaded.config)):
        assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_the_control_with_one_mixture_is_the_softmax() -> None:
    original = tiny_causal_lm()
    model = MoSForCausalLM.from_causal_lm(original, num_mixtures=1)
    assert log_prob_gap(model, original, input_ids=random_tokens()) <= 1e-5


def component_divergence(model: MoSForCausalLM, tokens: Tensor) -> float:
    """Mean Kullback-Leibler divergence between pairs of components, in nats."""
    with torch.no_grad():
        log_probs = model.lm_head.components(model.head_inputs(input_ids=tokens))[1].log_softmax(-1)  # (B, T, K, V)
    left, right = log_probs.unsqueeze(-2), log_probs.unsqueeze(-3)
    return float((left.exp() * (left - right)).sum(-1).mean())


def train(model: PreTrainedModel, tokens: Tensor, steps: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_components_part_when_trained_and_clones_do_not(name: str, head: dict) -> None:
    tokens = random_tokens(4, 16)
    models = {}
    for kind in ("retrofit", "clones"):
        models[kind] = MoSForCausalLM.from_causal_lm(tiny_causal_lm(name), num_mixtures=3, **head)
    with torch.no_grad():
        models["clones"].lm_head.prior.weight.zero_()
    divergences = {kind: [component_divergence(model, tokens)] for kind, model in models.items()}
    for kind, model in models.items():
        for _ in range(2):
            losses = train(model, tokens, steps=5)
            divergences[kind].append(component_divergence(model, tokens))
        assert losses[-1] < losses[0]
    start, middle, end = divergences["retrofit"]
    assert abs(start) < 1e-6
    assert middle > 1e-3
    assert end > 1.5 * middle
    assert max(map(abs, divergences["clones"])) < 1e-6


@pytest.mark.parametrize("name", BACKBONES)
def test_the_causal_lm_is_left_as_it_was(name: str) -> None:
    original = tiny_causal_lm(name)
    control = copy.deepcopy(original)
    class_attributes = {key: value for key, value in vars(type(original)).items() if not key.startswith("__")}
    class_attributes = copy.deepcopy({k: v for k, v in class_attributes.items() if isinstance(v, (dict, list, set))})
    MoSForCausalLM.from_causal_lm(original)
    assert original.config.to_dict() == control.config.to_dict()
    assert original.state_dict().keys() == control.state_dict().keys()
    assert original.all_tied_weights_keys == control.all_tied_weights_keys
    assert {key: vars(type(original))[key] for key in class_attributes} == class_attributes
    assert log_prob_gap(original, control, input_ids=random_tokens()) == 0
    assert torch.equal(greedy(original, random_tokens()), greedy(control, random_tokens()))


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_are_shared_not_copied(name: str) -> None:
    original = tiny_causal_lm(name)
    model = MoSForCausalLM.from_causal_lm(original)
    theirs = {tensor.data_ptr() for tensor in original.parameters()}
    ours = {tensor.data_ptr() for tensor in model.parameters()}
    assert theirs <= ours
    added = {model.lm_head.prior.weight.data_ptr(), model.lm_head.shift.weight.data_ptr()}
    assert ours - theirs == added


def test_a_path_is_loaded_once(tmp_path: Path) -> None:
    tiny_causal_lm("llama").save_pretrained(tmp_path)
    gc.collect()
    before = {id(value) for value in gc.get_objects() if issubclass(type(value), Tensor)}
    model = MoSForCausalLM.from_causal_lm(tmp_path)
    gc.collect()
    new = [value for value in gc.get_objects() if issubclass(type(value), Tensor) and id(value) not in before]
    wide = [tensor for tensor in new if VOCAB_SIZE in tensor.shape]
    owned = {model.get_input_embeddings().weight.data_ptr(), model.lm_head.weight.data_ptr()}
    assert {tensor.data_ptr() for tensor in wide} == owned


def test_a_path_takes_the_arguments_of_from_pretrained(tmp_path: Path) -> None:
    original = tiny_causal_lm("gpt2")
    original.generation_config = GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True)
    original.save_pretrained(tmp_path)
    model = MoSForCausalLM.from_causal_lm(
        str(tmp_path), num_mixtures=2, dtype=torch.bfloat16, device_map="cpu", revision="main", latent_scale=0.1
    )
    assert model.config.num_mixtures == 2
    assert model.config.latent_scale == 0.1
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.lm_head.shift.weight.dtype == torch.bfloat16
    assert model.lm_head.prior.weight.dtype == torch.float32
    assert model.config.name_or_path == str(tmp_path)
    assert not model.name_or_path
    assert not model.training
    assert (model.generation_config.max_new_tokens, model.generation_config.temperature) == (7, 0.5)
    assert log_prob_gap(model, original.to(torch.bfloat16), input_ids=random_tokens()) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    original = tiny_causal_lm("llama-tied").to(dtype)
    model = MoSForCausalLM.from_causal_lm(original)
    assert model.dtype == model.config.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert model.lm_head.prior.weight.dtype == wide
    outputs = model(input_ids=random_tokens())
    assert outputs.logits.dtype == wide


def test_generation_config_is_kept() -> None:
    original = tiny_causal_lm()
    original.generation_config.max_new_tokens = 3
    model = MoSForCausalLM.from_causal_lm(original)
    assert model.generate(random_tokens(1, 4)).shape == (1, 7)
    model.generation_config.max_new_tokens = 5
    assert original.generation_config.max_new_tokens == 3


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training: bool) -> None:
    assert MoSForCausalLM.from_causal_lm(tiny_causal_lm().train(training)).training is training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mixtures": 0}, "num_mixtures: expected an int of at least 1, given 0"),
        ({"num_mixtures": "four"}, "num_mixtures: expected an int of at least 1, given 'four'"),
        ({"num_mixtures": True}, "num_mixtures: expected an int of at least 1, given True"),
        ({"shortlist_size": 0}, "shortlist_size: expected an int of at least 1, or None, given 0"),
        ({"shortlist_size": 98}, "shortlist_size: expected at most 97, all classes, given 98"),
        ({"shift_rank": 0}, "shift_rank: expected an int of at least 1, or None, given 0"),
        ({"latent_scale": 0}, "latent_scale: expected a finite number above 0, or None, given 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False"),
        ({"num_mixture": 4}, "num_mixture"),
        ({"latent_rank": 4}, "latent_rank"),
        ({"softcap": 30.0}, "softcap"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoSForCausalLM.from_causal_lm(tiny_causal_lm("llama"), **options)


@pytest.mark.parametrize("vocab_size", [70, 4096])
@pytest.mark.parametrize(
    ("options", "num_mixtures", "shortlist_size"),
    [
        ({}, 16, 64),
        ({"latent_scale": 0.1}, 16, 64),
        ({"num_mixtures": 4}, 4, 64),
        ({"num_mixtures": 4, "shortlist_size": 5}, 4, 5),
        ({"shortlist_size": None}, 16, None),
    ],
)
def test_one_default_whatever_else_is_given(
    options: dict, num_mixtures: int, shortlist_size: int | None, vocab_size: int, tmp_path: Path
) -> None:
    original = tiny_causal_lm("llama", vocab_size=vocab_size)
    original.save_pretrained(tmp_path)
    for model in (original, tmp_path):
        converted = MoSForCausalLM.from_causal_lm(model, **options)
        for owner in (converted.config, converted.lm_head):
            assert (owner.num_mixtures, owner.shortlist_size) == (num_mixtures, shortlist_size)


def test_a_shortlist_larger_than_the_vocabulary_is_the_whole(tmp_path: Path) -> None:
    original = tiny_causal_lm("llama", vocab_size=40)
    model = MoSForCausalLM.from_causal_lm(original, num_mixtures=3)
    part_components(model)
    tokens = random_tokens() % 40
    assert log_prob_gap(MoSForCausalLM.from_causal_lm(original), original, input_ids=tokens) < 1e-5
    outputs = model.train()(input_ids=tokens, labels=tokens, skip_logits=False)
    torch.testing.assert_close(outputs.logits.exp().sum(-1), torch.ones(2, 12))
    nll = F.nll_loss(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, nll)
    model.save_pretrained(tmp_path)
    assert log_prob_gap(MoSForCausalLM.from_pretrained(tmp_path), model.eval(), input_ids=tokens) == 0


def test_the_path_of_a_mixture_is_refused(tmp_path: Path) -> None:
    MoSForCausalLM.from_causal_lm(tiny_causal_lm("llama")).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model: expected a causal LM with a softmax head, given .*, a mixture already"
    ):
        MoSForCausalLM.from_causal_lm(tmp_path)
    with pytest.raises(ValueError, match="a mixture already"):
        MoSForCausalLM.from_causal_lm(MoSForCausalLM.from_pretrained(tmp_path))


def test_a_model_that_is_no_causal_lm_is_refused_in_one_line(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model: expected a causal LM, given .*, a T5Config, which is not one$"):
        MoSForCausalLM.from_causal_lm(tmp_path)


def test_unknown_options_are_refused_with_a_path(tmp_path: Path) -> None:
    tiny_causal_lm("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_mixture"):
        MoSForCausalLM.from_causal_lm(tmp_path, num_mixture=4)
    with pytest.raises(ValueError, match="num_mixtures: expected an int"):
        MoSForCausalLM.from_causal_lm(tmp_path / "is not read", num_mixtures=0)


def test_a_mixture_is_not_converted_again() -> None:
    with pytest.raises(ValueError, match="softmax head, given MoSLlamaForCausalLM, a mixture already"):
        MoSForCausalLM.from_causal_lm(MoSForCausalLM.from_causal_lm(tiny_causal_lm()))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a causal LM"):
        MoSForCausalLM.from_causal_lm(tiny_causal_lm().model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected"):
        MoSForCausalLM.from_causal_lm(3)


def test_the_code_beside_a_checkpoint_does_not_convert(tmp_path: Path) -> None:
    MoSForCausalLM.from_causal_lm(tiny_causal_lm("llama")).save_pretrained(tmp_path)
    remote = get_class_from_dynamic_module("modeling_mos.MoSForCausalLM", tmp_path)
    with pytest.raises(ImportError, match="from_causal_lm: expected `import hf_mos`"):
        remote.from_causal_lm(tiny_causal_lm("llama"))


def test_from_pretrained_hands_on_all_arguments_for_a_softmax_model(tmp_path: Path) -> None:
    original = tiny_causal_lm("llama")
    original.save_pretrained(tmp_path / "model")
    config = copy.deepcopy(original.config)
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path / "config")
    softmax = type(original).from_pretrained(tmp_path / "model", config=config)
    for given in (config, str(tmp_path / "config"), tmp_path / "config"):
        model = MoSForCausalLM.from_pretrained(tmp_path / "model", config=given)
        assert log_prob_gap(model, softmax, input_ids=random_tokens()) <= 1e-5
    wider = {"vocab_size": VOCAB_SIZE + 8, "ignore_mismatched_sizes": True}
    assert MoSForCausalLM.from_pretrained(tmp_path / "model", **wider).lm_head.out_features == VOCAB_SIZE + 8
    with pytest.raises(ValueError, match="output_loading_info: expected False"):
        MoSForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ValueError, match=r"config: expected MoSConfig.from_backbone_config.*given LlamaConfig"):
        MoSForCausalLM.from_pretrained(tmp_path / "mixture", config=config)


def test_a_model_that_writes_logits_itself_is_refused() -> None:
    """It would write into the hidden states: NaN in every prediction."""
    config = ChameleonConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.vocabulary_map = {"<image>": 4, "IMGIMGAZ": 5}
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(config)
    with pytest.raises(ValueError, match="expected a causal LM whose forward returns the head's logits as they are"):
        MoSForCausalLM.from_causal_lm(model)


@pytest.mark.parametrize("load", [MoSForCausalLM.from_pretrained, MoSForCausalLM.from_causal_lm])
def test_the_folder_of_an_adapter_is_named(load: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"expected the folder of a causal LM.*which holds an adapter alone"):
        load(str(tmp_path))
