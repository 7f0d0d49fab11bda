"""Tiny causal LMs with random weights, and helpers that several test files use."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_processes import TRANSFORMERS, fork_server
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    Trainer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_mos import MoSForCausalLM
from hf_mos.remote_code import mos_decoder, mos_head

VOCAB_SIZE = 97
PAD, BOS, EOS = 0, 1, 2

# Weights are drawn so wide that the most likely token leads by far more than rounding. No token ends a sequence.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
ATTENTION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON, **ATTENTION, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**COMMON, **ATTENTION, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        **COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "mamba": lambda: MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=2, state_size=8),
    "gemma2": lambda: Gemma2Config(
        **COMMON, **ATTENTION, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, final_logit_softcapping=5.0
    ),
    "mixtral": lambda: MixtralConfig(**COMMON, **ATTENTION, num_local_experts=4, num_experts_per_tok=2),
}
BACKBONES = list(CONFIGS)
WITH_ATTENTION = [name for name in BACKBONES if name != "mamba"]
# Further ones, for tests of the head's place and name.
MORE_CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(
        **COMMON,
        **{k: v for k, v in ATTENTION.items() if k != "num_key_value_heads"},
        is_decoder=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    "cohere": lambda: CohereConfig(**COMMON, **ATTENTION, logit_scale=0.5),
    "gpt_neox": lambda: GPTNeoXConfig(
        **COMMON, **{k: v for k, v in ATTENTION.items() if k != "num_key_value_heads"}, hidden_act="gelu"
    ),
}
# The two kinds of heads: components that differ on all classes, and on a shortlist.
HEADS: list[dict[str, Any]] = [{"shortlist_size": None}, {"shortlist_size": 5}]


def tiny_causal_lm(name: str = "llama", seed: int = 0, **fields: Any) -> PreTrainedModel:
    """An untrained causal LM in evaluation mode; the same weights for the same arguments."""
    config = (CONFIGS | MORE_CONFIGS)[name]()
    for field, value in fields.items():
        setattr(config, field, value)
    torch.manual_seed(seed)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def tiny_mos(name: str = "llama", num_mixtures: int = 3, seed: int = 0, **options: Any) -> MoSForCausalLM:
    """A tiny causal LM with a mixture whose components differ, as after training.

    The components differ on the default shortlist of 64 of the 97 classes unless `shortlist_size` says otherwise.
    """
    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(name, seed), num_mixtures=num_mixtures, **options)
    part_components(model)
    return model


@torch.no_grad()
def part_components(model: MoSForCausalLM, distance: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    head = model.mos_head
    weight = head.shift.weight
    weight += distance / head.latent_scale * torch.randn(weight.shape, generator=generator).to(weight)


@contextlib.contextmanager
def chunks_of(size: int | None) -> Iterator[None]:
    """Makes the losses compute so many tokens at a time; `None`: as many as their budget allows."""
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:
            for module in (mos_decoder, mos_head):
                patch.setattr(module, "tokens_per_chunk", lambda *_: size)
                patch.setattr(module, "ROW_BYTES", 1)  # the rows of the shortlist of one token at a time
        yield


def random_tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)


def log_prob_gap(model: PreTrainedModel, other: PreTrainedModel, **inputs: Tensor) -> float:
    """Largest difference of two models' log-probabilities."""
    with torch.no_grad():
        ours, theirs = (m(**inputs).logits.float().log_softmax(-1) for m in (model, other))
    return float((ours - theirs).abs().max())


def greedy(model: PreTrainedModel, input_ids: Tensor, new_tokens: int = 8, **kwargs: Any) -> Tensor:
    return model.generate(input_ids, max_new_tokens=new_tokens, do_sample=False, **kwargs)


def logged_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def run_python(
    code: str, *arguments: Any, cache: Path, without_hf_mos: bool = True, shares_imports: bool = True
) -> str:
    """Runs code in a fresh process, by default one that cannot import hf_mos, and returns what it printed.

    The process keeps its copies of remote code under `cache`. It is a fork of one that has imported transformers and
    nothing of ours, unless `shares_imports` is False.
    """
    variables = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    without = ("hf_mos",) if without_hf_mos else ()
    if shares_imports:
        process = fork_server(*TRANSFORMERS).run(
            "import sys, warnings\n" + code,
            *arguments,
            cwd=cache,
            environment=variables,
            warnings_are_errors=True,
            without=without,
            timeout=120,
        )
    else:
        prelude = "import sys, warnings\nwarnings.simplefilter('error')\n"
        prelude += "".join(f"sys.modules[{name!r}] = None\n" for name in without)
        process = subprocess.run(
            [sys.executable, "-c", prelude + code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | variables,
            timeout=120,
            cwd=cache,
        )
    assert process.returncode == 0, process.stderr
    return process.stdout
