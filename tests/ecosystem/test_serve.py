"""Checks that transformers' OpenAI-compatible server serves a mixture to OpenAI's client."""

import base64
import io
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
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from hf_mos import MoSForCausalLM

MESSAGES: list[Any] = [{"role": "user", "content": "Sentence 3 says that"}]
PROMPT = "Sentence 3 says that"
NEW_TOKENS = 12
IMAGE_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)


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


@pytest.fixture
def reads_images(base: Path, tmp_path: Path) -> Path:
    """A folder with the mixture of a tiny Llava and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens("<image>", special_tokens=True)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": None, **size}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **size}
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=image_token_id, image_seq_length=4)
    torch.manual_seed(0)
    original = LlavaForConditionalGeneration(config)
    for parameter in original.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    original.generation_config.suppress_tokens = [image_token_id]
    MoSForCausalLM.from_causal_lm(original, num_mixtures=3).save_pretrained(tmp_path / "model")
    scale = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**scale), tokenizer, 8, "default", IMAGE_TEMPLATE, num_additional_image_tokens=1
    )
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_image_reaches_the_model(reads_images: Path, tmp_path: Path) -> None:
    model, processor = AutoModelForCausalLM.from_pretrained(reads_images), AutoProcessor.from_pretrained(reads_images)
    answers = []
    with server(reads_images, tmp_path) as client:
        for color in ("red", "blue"):
            image, file = Image.new("RGB", (16, 16), color), io.BytesIO()
            image.save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            content: list[Any] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
            answer = client.chat.completions.create(
                model=str(reads_images),
                messages=[{"role": "user", "content": content}],
                max_tokens=NEW_TOKENS,
                temperature=0,
            )
            answers.append(answer.choices[0].message.content)
            inputs = processor(images=image, text=f"<image>{PROMPT}", return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[
                0, inputs.input_ids.shape[1] :
            ]
            assert answers[-1] == processor.decode(tokens, skip_special_tokens=True)
    assert answers[0] != answers[1]


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
