"""Settings of the tests of vLLM, and the engine that they share. `make test-vllm` makes their environment."""

import os
import tempfile

# Before vLLM is imported. One process for the engine and the test: a start takes seconds, and errors come through.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CACHE_ROOT": tempfile.mkdtemp(prefix="vllm-cache-"),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two processes on one NUMA node are refused otherwise
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import missing_requirements

torch.set_num_threads(1)

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "block_size": 32,  # the CPU's attention takes multiples of it
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 * 2**20,
}


def pytest_configure() -> None:
    if missing := missing_requirements("vllm-cpu"):
        raise pytest.UsageError(
            f"tests/vllm_plugin: expected the extra `vllm-cpu`, given an environment without {', '.join(missing)}. "
            "Run `make test-vllm`, which has an environment of its own"
        )


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["VLLM_CACHE_ROOT"], ignore_errors=True)


@pytest.fixture(scope="session")
def known_classes() -> None:
    """Makes the classes of the mixtures here, where vLLM would start a process to look at each."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from hf_mos.tools import vllm_model

    for name in ("Llama", "Qwen3", "Mixtral", "Gemma2", "Cohere", "GPTJ", "GPTNeoX", "Phi"):
        ModelRegistry.register_model(f"MoS{name}ForCausalLM", getattr(vllm_model, f"MoS{name}ForCausalLM"))
    ModelRegistry.register_model("MoSGPT2LMHeadModel", vllm_model.MoSGPT2LMHeadModel)


@pytest.fixture(scope="session")
def engine(known_classes: None) -> Callable[..., Any]:
    """Starts vLLM on a folder for the time of a `with` block."""
    from vllm import LLM

    @contextmanager
    def start(folder: Path, **options: Any) -> Iterator[LLM]:
        llm = LLM(str(folder), **ENGINE | {"skip_tokenizer_init": True} | options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    return start
