"""Tiny mixtures of sizes that vLLM serves on a CPU, and what transformers predicts with them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers import COMMON, VOCAB_SIZE, part_components
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from hf_mos import MoSConfig, MoSForCausalLM

NEW_TOKENS = 8
# The CPU's attention takes heads of 32 and more.
ATTENTION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
GROUPED = ATTENTION | {"num_key_value_heads": 1, "head_dim": 32}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON, **GROUPED, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**COMMON, **GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**COMMON, **GROUPED, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**COMMON, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": lambda: Gemma2Config(
        **COMMON, **GROUPED, query_pre_attn_scalar=32, sliding_window=16, final_logit_softcapping=5.0
    ),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=64, n_layer=2, n_head=2, n_positions=128),
    "gpt-j": lambda: GPTJConfig(**COMMON, n_embd=64, n_layer=2, n_head=2, n_positions=128, rotary_dim=16),
    "cohere": lambda: CohereConfig(**COMMON, **ATTENTION, logit_scale=0.25),
    "gpt-neox": lambda: GPTNeoXConfig(**COMMON, **ATTENTION),
    "phi": lambda: PhiConfig(**COMMON, **ATTENTION),
}
# A mixture for each architecture, and for each kind of head.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama-tied", {}),
    "llama, untied by the conversion": ("llama-tied", {"tie_word_embeddings": False}),
    "llama, a shortlist": ("llama", {"shortlist_size": 8}),
    "llama, tied, a shortlist": ("llama-tied", {"shortlist_size": 8}),
    "llama, one softmax": ("llama", {"num_mixtures": 1}),
    "llama, another scale": ("llama", {"latent_scale": 0.5}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "gemma2": ("gemma2", {}),
    "gemma2, untied, a shortlist": ("gemma2", {"tie_word_embeddings": False, "shortlist_size": 8}),
    "gpt2": ("gpt2", {}),
    "gpt-j, whose decoder has a bias": ("gpt-j", {}),
    "cohere": ("cohere", {}),
    "cohere, untied": ("cohere", {"tie_word_embeddings": False}),
    "gpt-neox, whose head has another name in a checkpoint": ("gpt-neox", {}),
    "phi, through vLLM's transformers backend": ("phi", {}),
    "phi, a shortlist": ("phi", {"shortlist_size": 8}),
}


class Reference(NamedTuple):
    """What transformers predicts: greedy tokens, the prompt's and new ones, and the log-probabilities at each."""

    folder: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    log_probs: Tensor  # (batch, position, V)


def make_mixture(name: str, seed: int = 0, **options: Any) -> MoSForCausalLM:
    """An untrained mixture whose components differ, whose bias is not zero, and whose untied decoder is another.

    Its components differ on all classes unless `shortlist_size` says otherwise.
    """
    config = CONFIGS[name]()
    config._attn_implementation = "eager"  # Gemma 2 caps the logits of its attention in this one alone
    config.tie_word_embeddings = options.pop("tie_word_embeddings", config.tie_word_embeddings)
    options = {"num_mixtures": 3, "shortlist_size": None} | options
    torch.manual_seed(seed)
    mixture = MoSForCausalLM(MoSConfig.from_backbone_config(config, **options)).eval()
    head = mixture.lm_head
    with torch.no_grad():
        if head.bias is not None:
            head.bias += torch.randn_like(head.bias) / 2
        if not mixture.config.tie_word_embeddings:
            head.weight += torch.randn_like(head.weight) / 10
    part_components(mixture)
    return mixture


def reference_of(mixture: MoSForCausalLM, folder: Path, prompts: Tensor, **generation: Any) -> Reference:
    """Saves the mixture and predicts with it."""
    mixture.save_pretrained(folder)
    tokens = mixture.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, **generation)
    with torch.no_grad():
        log_probs = mixture(tokens).logits
    return Reference(folder, prompts.tolist(), tokens.tolist(), log_probs)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with one word for each class."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
