"""Fixtures that the client tests share: a tiny tokenizer, a Llama, the same Llama with a mixture, and a text file.

pytest enters this folder only if the command line names it. It then checks that the extra `ecosystem` is installed.
"""

from pathlib import Path

import pytest
import torch
from extras import missing_requirements
from helpers import ATTENTION, part_components
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_mos import MoSForCausalLM

END = "<|end|>"
SENTENCES = [f"Sentence {i} says that {i} times {i} is {i * i}, and {i} plus one is {i + 1}." for i in range(400)]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def pytest_configure() -> None:
    if missing := missing_requirements("ecosystem"):
        raise pytest.UsageError(
            "tests/ecosystem: expected the extra `ecosystem`, given an environment without "
            f"{', '.join(missing)}. Run `make test-ecosystem`, which installs it"
        )


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained tiny Llama and a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("base")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=300, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}  # generation never stops early
    config = LlamaConfig(vocab_size=len(tokenizer), **(ATTENTION | special), initializer_range=0.3)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mixture(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same Llama and a mixture whose components differ, as after training."""
    folder = tmp_path_factory.mktemp("mixture")
    model = MoSForCausalLM.from_causal_lm(base, num_mixtures=3)
    part_components(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file with one sentence a line."""
    file = tmp_path_factory.mktemp("text") / "sentences.txt"
    file.write_text("\n".join(SENTENCES[:40]))
    return file
