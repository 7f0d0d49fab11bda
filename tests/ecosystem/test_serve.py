"""Checks that transformers' OpenAI-compatible server serves a mixture to OpenAI's client."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

MESSAGES: list[Any] = [{"role": "user", "content": "Sentence 3 says that"}]
PROMPT = "Sentence 3 says that"
NEW_TOKENS = 12


@contextmanager
def server(folder: Path | None, cache: Path, *options: str) -> Iterator[OpenAI]:
    """`hf-mos serve` on a free port, and a client of it."""
    environment = os.environ | {"HF_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "hf_mos.tools.cli",
        "serve",
        *([] if folder is None else [str(folder)]),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=cache
    )
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            running = re.search(r"Uvicorn running on http://localhost:(\d+)", line)
            if running:
                break
        else:
            pytest.fail("".join(said))
        with OpenAI(base_url=f"http://localhost:{running[1]}/v1", api_key="none", timeout=120) as client:
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:  # the thread of continuous batching goes on
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def client(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with server(mixture, tmp_path_factory.mktemp("home")) as client:
        yield client


def generated(folder: Path, tokens: torch.Tensor, **options: Any) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    output = model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return AutoTokenizer.from_pretrained(folder).decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def test_a_chat_is_streamed(client: OpenAI, mixture: Path) -> None:
    chunks = list(
        client.chat.completions.create(
            model=str(mixture), messages=MESSAGES, max_tokens=NEW_TOKENS, temperature=0, stream=True
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    tokens = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt").input_ids
    assert text == generated(mixture, tokens)
    assert len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == NEW_TOKENS


def test_a_prompt_is_completed(client: OpenAI, mixture: Path) -> None:
    completion = client.completions.create(model=str(mixture), prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0)
    tokens = AutoTokenizer.from_pretrained(mixture)(PROMPT, return_tensors="pt").input_ids
    assert completion.choices[0].text == generated(mixture, tokens)


def test_the_model_is_listed_where_there_is_no_hub_cache(client: OpenAI, mixture: Path) -> None:
    assert [(model.id, model.object) for model in client.models.list()] == [(str(mixture), "model")]


def test_without_a_model_those_of_the_cache_are_listed(tmp_path: Path) -> None:
    with server(None, tmp_path) as client:
        assert list(client.models.list()) == []


def test_continuous_batching(mixture: Path, tmp_path: Path) -> None:
    options = [
        "--continuous-batching",
        "--cb-num-blocks",
        "8",
        "--cb-max-batch-tokens",
        "64",
    ]  # else half of the memory
    with server(mixture, tmp_path, *options) as client:
        completion = client.completions.create(model=str(mixture), prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0)
    tokens = AutoTokenizer.from_pretrained(mixture)(PROMPT, return_tensors="pt").input_ids
    assert completion.choices[0].text == generated(mixture, tokens)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    process = run_command("serve", "./none", cache=tmp_path, code=2)
    assert "Traceback" not in process.stderr
    assert "./none" in process.stderr


def test_a_port_in_use_is_refused(mixture: Path, tmp_path: Path) -> None:
    """The server would say so, and then neither serve nor end."""
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        for words in (["--port", port], [f"--port={port}"]):
            process = run_command("serve", mixture, *words, cache=tmp_path, code=2)
            assert f"expected an address to listen on, given localhost:{port}" in process.stderr


def test_the_help_has_the_options_of_the_server(tmp_path: Path) -> None:
    printed = run_command("serve", "--help", cache=tmp_path).stdout
    assert {"--port", "--continuous-batching", "--quantization"} <= set(printed.split())
