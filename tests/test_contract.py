"""Checks what transformers requires of every model besides training, saving and generating."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BACKBONES,
    VOCAB_SIZE,
    WITH_ATTENTION,
    greedy,
    log_prob_gap,
    random_tokens,
    tiny_causal_lm,
    tiny_mos,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, QuantoConfig

from hf_mos import MoSForCausalLM, MoSLMHead


def log_probs(model: MoSForCausalLM, tokens: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **kwargs).logits


# ------------------------------------------------------------------------------------------------ forward's arguments


@pytest.mark.parametrize("name", BACKBONES)
def test_logits_to_keep(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    whole = log_probs(model, tokens)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(log_probs(model, tokens, logits_to_keep=1), whole[:, -1:], **close)
    torch.testing.assert_close(log_probs(model, tokens, logits_to_keep=5), whole[:, -5:], **close)
    torch.testing.assert_close(log_probs(model, tokens, logits_to_keep=0), whole, **close)
    positions = torch.tensor([2, 7, 3])
    torch.testing.assert_close(log_probs(model, tokens, logits_to_keep=positions), whole[:, positions], **close)
    with torch.no_grad():
        outputs = model(input_ids=tokens, labels=tokens, logits_to_keep=2)
    torch.testing.assert_close(outputs.logits, whole[:, -2:], **close)
    torch.testing.assert_close(outputs.loss, model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("name", BACKBONES)
def test_hidden_states(name: str) -> None:
    original = tiny_causal_lm(name)
    model = MoSForCausalLM.from_causal_lm(original)
    tokens = random_tokens()
    with torch.no_grad():
        expected = original(input_ids=tokens, output_hidden_states=True).hidden_states
        outputs = model(input_ids=tokens, output_hidden_states=True)
        assert model(input_ids=tokens).hidden_states is None
        torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert len(outputs.hidden_states) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(outputs.hidden_states, expected, strict=True))


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attentions(name: str) -> None:
    original = tiny_causal_lm(name)
    original.set_attn_implementation("eager")
    model = MoSForCausalLM.from_causal_lm(original)
    tokens = random_tokens()
    with torch.no_grad():
        expected = original(input_ids=tokens, output_attentions=True).attentions
        attentions = model(input_ids=tokens, output_attentions=True).attentions
    assert len(attentions) == 2
    assert all(torch.equal(*pair) for pair in zip(attentions, expected, strict=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_tuples(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    with torch.no_grad():
        outputs = model(input_ids=tokens, labels=tokens)
        loss, logits, *_ = model(input_ids=tokens, labels=tokens, return_dict=False)
        assert torch.equal(loss, outputs.loss)
        assert torch.equal(logits, outputs.logits)
        assert torch.equal(model(input_ids=tokens, return_dict=False)[0], outputs.logits)


def test_output_class_is_the_backbones() -> None:
    for name in BACKBONES:
        original = tiny_causal_lm(name)
        outputs = MoSForCausalLM.from_causal_lm(original)(input_ids=random_tokens())
        assert type(outputs) is type(original(input_ids=random_tokens()))


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_padding_does_not_reach_other_tokens(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    padded = torch.cat([tokens, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    mask = (torch.arange(16) < 12).long().expand(2, -1)
    torch.testing.assert_close(
        log_probs(model, padded, attention_mask=mask)[:, :12], log_probs(model, tokens), atol=1e-5, rtol=1e-5
    )


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # transformers' own call
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's compiler's own call
@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations(name: str, implementation: str, tmp_path: Path) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    expected = log_probs(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    model.set_attn_implementation(implementation)
    for candidate in (loaded, model):
        assert candidate.config._attn_implementation == implementation
        torch.testing.assert_close(log_probs(candidate, tokens), expected, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("name", BACKBONES)
def test_resized_embeddings_keep_the_mixture(name: str, tmp_path: Path) -> None:
    model = tiny_mos(name, shortlist_size=None)  # new classes may push others from a shortlist
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    tokens = random_tokens() % 60

    def component_logits() -> Tensor:
        with torch.no_grad():
            return model.lm_head.components(model.head_inputs(input_ids=tokens))[1]

    expected = component_logits()[..., :60]
    for size, multiple, rows in ((VOCAB_SIZE + 6, None, 103), (VOCAB_SIZE + 6, 64, 128), (60, None, 60)):
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
        torch.testing.assert_close(component_logits()[..., :60], expected)
        assert model.config.vocab_size == rows
        assert model.get_input_embeddings().weight.shape[0] == rows
        assert model.lm_head.weight.shape[0] == model.lm_head.out_features == rows
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is is_tied
        assert log_probs(model, tokens).shape[-1] == rows
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.testing.assert_close(loss, model.eval()(input_ids=tokens, labels=tokens).loss)
        del loss  # its graph remembers the old size
        model.zero_grad()
        model.save_pretrained(tmp_path)
        assert log_prob_gap(AutoModelForCausalLM.from_pretrained(tmp_path), model, input_ids=tokens) == 0


@pytest.mark.parametrize("name", BACKBONES)
def test_resized_embeddings_are_those_of_the_causal_lm(name: str) -> None:
    original = tiny_causal_lm(name)
    model = MoSForCausalLM.from_causal_lm(copy.deepcopy(original))
    for size in (VOCAB_SIZE + 7, 50):
        for candidate in (original, model):
            torch.manual_seed(0)
            candidate.resize_token_embeddings(size)
        assert log_prob_gap(original, model, input_ids=random_tokens() % 50) <= 1e-4


@pytest.mark.parametrize("name", BACKBONES)
def test_tie_weights(name: str) -> None:
    model = tiny_mos(name)
    embedding = model.get_input_embeddings()
    is_tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is embedding.weight) is is_tied
    embedding.weight = nn.Parameter(torch.randn_like(embedding.weight))
    model.tie_weights()
    assert (model.lm_head.weight is embedding.weight) is is_tied


@pytest.mark.parametrize("name", BACKBONES)
def test_embeddings_can_be_read_and_set(name: str) -> None:
    model = tiny_mos(name)
    assert model.get_output_embeddings() is model.lm_head
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    model.set_input_embeddings(nn.Embedding(11, 32))
    model.set_output_embeddings(nn.Linear(32, 11, bias=False))
    assert log_probs(model, random_tokens() % 11).shape == (2, 12, 11)


# -------------------------------------------------------------------------------------------------- devices and dtypes


@pytest.mark.parametrize("name", BACKBONES)
def test_device_map(name: str, tmp_path: Path) -> None:
    model = tiny_mos(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    tokens = random_tokens()
    assert torch.equal(log_probs(loaded, tokens), log_probs(model, tokens))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.filterwarnings(
    "ignore:You are calling .generate:UserWarning"
)  # older transformers, of any offloaded model
@pytest.mark.parametrize("device_map", [{"": "disk"}, "auto"])
def test_disk_offload(name: str, device_map: Any, tmp_path: Path) -> None:
    model = tiny_mos(name)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, max_memory={"cpu": "70KB"}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    tokens = random_tokens()
    torch.testing.assert_close(log_probs(loaded, tokens), log_probs(model, tokens))
    assert torch.equal(greedy(loaded, tokens), greedy(model, tokens))
    with torch.no_grad():
        loss = loaded(input_ids=tokens, labels=tokens, skip_logits=True).loss
        torch.testing.assert_close(loss, model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("name", BACKBONES)
def test_meta_device(name: str) -> None:
    config = tiny_mos(name).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        original = tiny_causal_lm(name)
    assert all(weight.is_meta for weight in model.parameters())
    converted = MoSForCausalLM.from_causal_lm(original)
    assert all(weight.is_meta for weight in converted.parameters())
    for one, other in zip(model.state_dict().items(), tiny_mos(name).state_dict().items(), strict=True):
        assert (one[0], one[1].shape) == (other[0], other[1].shape)


@pytest.mark.parametrize("options", [{}, {"shortlist_size": None}, {"shift_rank": 4}])
def test_shapes_and_operations_on_the_meta_device(options: dict[str, Any]) -> None:
    """What a model would need, without numbers, as on the softmax model."""
    tokens = random_tokens()
    models = [tiny_causal_lm("llama"), tiny_mos("llama", **options)]
    of_head = []  # the operations of the mixture beyond those of the softmax model
    for device in ("cpu", "meta"):
        operations = []
        for model in models:
            model = copy.deepcopy(model).to(device)
            inputs = tokens.to(device)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                assert model(input_ids=inputs).logits.shape == (*tokens.shape, VOCAB_SIZE)
                assert model(input_ids=inputs[:, :1]).logits.shape == (len(tokens), 1, VOCAB_SIZE)
            operations.append(counter.get_total_flops())
            loss = model(input_ids=inputs, labels=inputs).loss
            loss.backward()
            assert loss.device.type == device
            assert all(weight.grad is not None for weight in model.parameters())
        of_head.append(operations[1] - operations[0])
    assert of_head[0] == of_head[1] > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_a_cast_model_works(name: str) -> None:
    model = tiny_mos(name)
    expected = log_probs(model, random_tokens())
    dtypes = [torch.bfloat16] if name == "mixtral" else [torch.bfloat16, torch.float64]  # its experts take no fp64
    for dtype in dtypes:
        cast = copy.deepcopy(model).to(dtype)
        assert cast.dtype == dtype
        outputs = cast.train()(input_ids=random_tokens(), labels=random_tokens(), skip_logits=False)
        outputs.loss.backward()
        if dtype == torch.float64:
            torch.testing.assert_close(outputs.logits.float(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_copies_and_pickles(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(log_probs(twin, tokens), log_probs(model, tokens))
        tied = (m.lm_head.weight is m.get_input_embeddings().weight for m in (twin, model))
        assert len(set(tied)) == 1
    for twin in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert twin.to_dict() == model.config.to_dict()


# ------------------------------------------------------------------------------------------------------------ the rest


def test_tags(tmp_path: Path) -> None:
    model = tiny_mos()
    model.add_model_tags(["mixture-of-softmaxes"])
    model.save_pretrained(tmp_path)
    assert "mixture-of-softmaxes" in model.model_tags


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mamba"])
def test_quantizers_skip_the_head(name: str, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    model = tiny_mos(name, shortlist_size=None)  # rounding may change a shortlist
    model.save_pretrained(tmp_path)
    config = QuantoConfig(weights="int8")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert isinstance(quantized.lm_head, MoSLMHead)
    for layer in (quantized.lm_head, quantized.lm_head.prior, quantized.lm_head.shift):
        assert type(layer.weight) is nn.Parameter
    assert quantized.lm_head.prior.weight.dtype == torch.float32
    assert any(type(module).__name__ == "QLinear" for module in quantized.modules())
    assert torch.equal(quantized.lm_head.prior.weight, model.lm_head.prior.weight)
    assert log_prob_gap(quantized, model, input_ids=random_tokens()) < 0.5


@pytest.mark.parametrize("name", BACKBONES)
def test_parameter_counts(name: str) -> None:
    original = tiny_causal_lm(name)
    added = MoSForCausalLM.from_causal_lm(original, num_mixtures=3).num_parameters() - original.num_parameters()
    assert added == 3 * 32 * 32 + 3 * 32
