"""Checks the conversion of a GGUF file: the mixture predicts what the file's softmax model does, saves and loads."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from helpers import log_prob_gap, random_tokens, tiny_causal_lm
from transformers import AutoModelForCausalLM

from hf_mos import MoSForCausalLM

FILE = "model.gguf"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleaves the halves of each head's rotary dimensions, as llama.cpp stores them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: Any, folder: Path) -> None:
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", weights["lm_head.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                weight = permuted(weight, heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_gguf_file_is_converted(name: str, tmp_path: Path) -> None:
    softmax, tokens = tiny_causal_lm(name), random_tokens()
    write_gguf(softmax, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE)
    assert log_prob_gap(loaded, softmax, input_ids=tokens) < 1e-4
    model = MoSForCausalLM.from_causal_lm(str(tmp_path), gguf_file=FILE)
    assert log_prob_gap(model, softmax, input_ids=tokens) < 1e-4
    assert log_prob_gap(MoSForCausalLM.from_causal_lm(loaded), softmax, input_ids=tokens) < 1e-4
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.save_pretrained(tmp_path / "mixture")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert log_prob_gap(reloaded, softmax, input_ids=tokens) < 1e-4
    assert not getattr(reloaded.config, "quantization_config", None)
