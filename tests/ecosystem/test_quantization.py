"""Checks torchao and bitsandbytes: which layers they quantise, and that the loss equals the dequantised model's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from helpers import HEADS, greedy, random_tokens, tiny_causal_lm, tiny_mos
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.base import get_keys_to_not_convert

from hf_mos import MoSForCausalLM
from hf_mos.training.hidden_states import freeze_backbone, keep_hidden_states

pytestmark = pytest.mark.filterwarnings("default")  # both speak of kernels that this machine lacks

TOKENS = random_tokens()
INT8 = Int8WeightOnlyConfig(version=2)


def wide_mos(name: str = "llama", **options: Any) -> MoSForCausalLM:
    """As wide as a block of bitsandbytes' 4-bit weights."""
    softmax = tiny_causal_lm(name, hidden_size=64, intermediate_size=64, head_dim=16)
    model = MoSForCausalLM.from_causal_lm(softmax, num_mixtures=3, **options)
    with torch.no_grad():
        for layer in (model.lm_head.prior, model.lm_head.shift):
            layer.weight += 0.05 / model.lm_head.latent_scale * torch.randn(layer.weight.shape)
    return model


@torch.no_grad()
def dequantise(model: MoSForCausalLM) -> MoSForCausalLM:
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), Int8Tensor):
            module.weight = nn.Parameter(module.weight.dequantize())
    return model


@torch.no_grad()
def predictions(model: Any) -> tuple[Tensor, Tensor]:
    outputs = model.eval()(input_ids=TOKENS, labels=TOKENS)
    log_probs = outputs.logits[:, :-1].gather(-1, TOKENS[:, 1:, None])
    torch.testing.assert_close(outputs.loss, -log_probs.mean())
    model.train()  # where the loss is not made of the log-probabilities
    with torch.enable_grad():
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(
        loss.detach(), outputs.loss, atol=0.05, rtol=0
    )  # bitsandbytes has other training kernels
    model.eval()
    return outputs.logits, outputs.loss


def quantised(model: MoSForCausalLM) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), Int8Tensor)}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_torchao_on_every_projection(name: str) -> None:
    """`quantize_` as it is takes the decoder, and does not look into it for the prior and the shift."""
    model = tiny_mos(name)
    quantize_(model, INT8)
    assert {name for name in quantised(model) if name.startswith("lm_head")} == {"lm_head"}
    logits, loss = predictions(model)
    generated = greedy(model, TOKENS)
    expected_logits, expected_loss = predictions(dequantise(model))
    torch.testing.assert_close(logits, expected_logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected_loss)
    assert generated.equal(greedy(model, TOKENS))


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_torchao_at_loading(name: str, options: dict, tmp_path: Path) -> None:
    wide_mos(name, **options).save_pretrained(tmp_path / "whole")
    whole = MoSForCausalLM.from_pretrained(tmp_path / "whole")
    model = MoSForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=TorchAoConfig(INT8))
    assert "model.layers.0.self_attn.q_proj" in quantised(model)
    assert not [name for name in quantised(model) if name.startswith("lm_head")]
    assert model.lm_head.prior.weight.dtype == torch.float32
    assert model.lm_head.prior.weight.equal(whole.lm_head.prior.weight)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name == "llama-tied")
    logits, loss = predictions(model)
    assert abs(float(loss - predictions(whole)[1])) < 0.5
    generated = greedy(model, TOKENS)

    model.save_pretrained(tmp_path / "int8")
    reloaded = MoSForCausalLM.from_pretrained(tmp_path / "int8")
    assert quantised(reloaded) == quantised(model)
    assert predictions(reloaded)[0].equal(logits)
    assert greedy(reloaded, TOKENS).equal(generated)

    expected_logits, expected_loss = predictions(dequantise(model))
    torch.testing.assert_close(logits, expected_logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected_loss)


def test_torchao_with_adapters(tmp_path: Path) -> None:
    wide_mos().save_pretrained(tmp_path)
    base = MoSForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(INT8))
    before = predictions(base)
    targets = ["q_proj", "lm_head.shift", "lm_head.prior"]
    model = get_peft_model(base, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(6):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert predictions(model)[1] < before[1] - 0.1
    with model.disable_adapter():
        assert predictions(model)[0].equal(before[0])


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_head_is_on_the_skip_list(name: str) -> None:
    tied = {"model.embed_tokens"} if name == "llama-tied" else set()
    # The last one is there as the module of the last parameter.
    assert set(get_keys_to_not_convert(tiny_mos(name))) == {"lm_head", *tied, "lm_head.shift"}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_bitsandbytes_on_the_cpu(bits: int, options: dict, tmp_path: Path) -> None:
    wide_mos(**options).save_pretrained(tmp_path)
    whole = MoSForCausalLM.from_pretrained(tmp_path)
    load = {"load_in_8bit": bits == 8, "load_in_4bit": bits == 4}
    config = BitsAndBytesConfig(**load, bnb_4bit_compute_dtype=torch.float32)
    model = MoSForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    layer = "Linear8bitLt" if bits == 8 else "Linear4bit"
    assert kinds["model.layers.0.self_attn.q_proj"] == layer
    assert (kinds["lm_head"], kinds["lm_head.prior"], kinds["lm_head.shift"]) == ("MoSLMHead", "Linear", "Linear")
    assert model.lm_head.prior.weight.dtype == torch.float32
    same = copy.deepcopy(whole)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            weight = module.weight if isinstance(module, (Linear4bit, Linear8bitLt)) else None
            if bits == 4 and weight is not None:
                dense = dequantize_4bit(weight.data, weight.quant_state)
                same.get_submodule(module_name).weight.copy_(dense)
            elif weight is not None:
                same.get_submodule(module_name).weight.copy_(weight.CB * weight.SCB.unsqueeze(1) / 127)
    loss, expected = predictions(model)[1], predictions(same)[1]
    tolerance = 0.1  # the activations are rounded too: to 8 bits, or to bf16 by the kernels of 4 bits
    assert abs(float(loss - expected)) < tolerance
    assert abs(float(loss - predictions(whole)[1])) > 1e-3
    assert greedy(model, TOKENS).shape == (2, TOKENS.shape[1] + 8)

    for name, weight in model.lm_head.named_parameters():
        assert weight.equal(whole.lm_head.get_parameter(name))


def refuses(model: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=r"model: expected weights that are not quantized, given .*\.weight"):
        MoSForCausalLM.from_causal_lm(model, **options)


@pytest.mark.parametrize(
    "config", [BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True), TorchAoConfig(INT8)]
)
def test_a_quantised_model_is_not_converted(config: Any, tmp_path: Path) -> None:
    """It could be saved, but not loaded; converted first and then quantised, it can."""
    softmax = tiny_causal_lm("llama", hidden_size=64, intermediate_size=64, head_dim=16)
    softmax.save_pretrained(tmp_path / "softmax")
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", quantization_config=config)
    refuses(quantised)
    refuses(str(tmp_path / "softmax"), quantization_config=config)
    quantised.save_pretrained(tmp_path / "quantised")
    refuses(str(tmp_path / "quantised"))
    by_hand = copy.deepcopy(softmax)
    quantize_(by_hand, INT8)
    refuses(by_hand)
    MoSForCausalLM.from_causal_lm(softmax).save_pretrained(tmp_path / "mixture")
    mixture = MoSForCausalLM.from_pretrained(tmp_path / "mixture", quantization_config=config)
    assert abs(float(predictions(mixture)[1] - predictions(MoSForCausalLM.from_causal_lm(softmax))[1])) < 0.5


@pytest.mark.parametrize(
    "config",
    [
        TorchAoConfig(INT8),
        BitsAndBytesConfig(load_in_8bit=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    ],
    ids=["torchao", "8 bits", "4 bits"],
)
def test_hidden_states_of_a_quantised_backbone_are_kept(config: Any, tmp_path: Path) -> None:
    wide_mos().save_pretrained(tmp_path / "model")
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    passes: list[range] = []

    def track(batches: Any) -> Any:
        passes.extend(batches)
        return iter(batches)

    def kept_by(model: Any) -> Tensor:
        freeze_backbone(model)
        kept = keep_hidden_states(model, rows, tmp_path / "states", track=track)
        return torch.stack([row["hidden_states"] for row in kept])

    models = [MoSForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config) for _ in range(3)]
    states = kept_by(models[0])
    with torch.no_grad():
        torch.testing.assert_close(states, models[0].head_inputs(input_ids=TOKENS))
    assert kept_by(models[1]).equal(states)
    assert len(passes) == 1
    # The same codes with other scales: the state dict names them.
    weights = models[2].get_submodule("model.layers.0.mlp.up_proj").state_dict(keep_vars=True)
    scale = next(
        getattr(value, "scale", value)
        for name, value in weights.items()
        if name != "weight" or config.quant_method == "torchao"
    )
    with torch.no_grad():
        scale.mul_(2)
    changed = kept_by(models[2])
    assert len(passes) == 2
    with torch.no_grad():
        torch.testing.assert_close(changed, models[2].head_inputs(input_ids=TOKENS))
    assert not torch.allclose(changed, states)
