"""Checks that train, evaluate and inspect take rows of messages, as the tokenizer's own chat template renders them."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import part_components, tiny_causal_lm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_mos import MoSForCausalLM
from hf_mos.tools.blocks import ValidationText, cut_windows, load_text, pack
from hf_mos.tools.chat import render
from hf_mos.tools.cli import app
from hf_mos.tools.evaluate import evaluate
from hf_mos.tools.texts import read_texts
from hf_mos.tools.train_options import DataOptions

PLAIN = (
    "{% for message in messages %}<|end|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|end|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant\n{% endif %}"
)
LAST_ONLY = "{% for message in messages %}{{ message['content'] if loop.last else '...' }}{% endfor %}"
CHATS: list[list[dict[str, str]]] = [
    [
        {"role": "user", "content": f"Sentence {i} says that"},
        {"role": "assistant", "content": f"{i} times {i} is {i * i}."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": f"{i} plus one is {i + 1}."},
    ]
    for i in range(30)
]


def rendered(chat: list[dict[str, str]]) -> str:
    return "".join(f"<|end|>{message['role']}\n{message['content']}<|end|>\n" for message in chat)


@pytest.fixture(params=["plain", "marked"])
def tokenizer(request: pytest.FixtureRequest, base: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"plain": PLAIN, "marked": MARKED}[request.param]
    return tokenizer


@pytest.fixture
def wide(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A mixture of D = 576, and the tokenizer, in a folder."""
    model = tiny_causal_lm(hidden_size=576, num_attention_heads=8, head_dim=72, vocab_size=len(tokenizer))
    mixture = MoSForCausalLM.from_causal_lm(model, num_mixtures=2)
    part_components(mixture, 0.02)
    mixture.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat, "source": "arithmetic"}) for chat in CHATS))
    return file


def spans_of_the_assistant(chat: list[dict[str, str]]) -> list[tuple[int, int]]:
    spans, start = [], 0
    for message in chat:
        header, turn = f"<|end|>{message['role']}\n", f"{message['content']}<|end|>\n"
        if message["role"] == "assistant":
            spans.append((start + len(header), start + len(header) + len(turn)))
        start += len(header) + len(turn)
    return spans


def test_the_turns_of_the_assistant_are_found(tokenizer: PreTrainedTokenizerFast) -> None:
    for chat, row in zip(CHATS, render(tokenizer, CHATS, assistant_only=True), strict=True):
        assert row.text == rendered(chat)
        assert row.turns == spans_of_the_assistant(chat)
    assert render(tokenizer, CHATS[:1], assistant_only=False)[0].turns is None


def test_what_cannot_be_rendered_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="--assistant-only: expected rows of messages, given text"):
        render(tokenizer, ["text"], assistant_only=True)
    tokenizer.chat_template = LAST_ONLY
    with pytest.raises(ValueError, match="renders a turn alike whatever follows it"):
        render(tokenizer, CHATS, assistant_only=True)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="expected one with a chat template"):
        render(tokenizer, CHATS, assistant_only=False)


@pytest.mark.parametrize("assistant_only", [False, True])
def test_evaluate_counts_each_token_or_those_of_the_assistant(
    wide: Path, tokenizer: PreTrainedTokenizerFast, assistant_only: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(wide).eval()
    texts = render(tokenizer, CHATS[:3], assistant_only)
    result = evaluate(model, tokenizer, texts, window=24, stride=5, batch_size=2)
    nats, count, size = 0.0, 0, 0
    for chat in CHATS[:3]:
        # The template begins with the token that stands before a text, so there is no other before it, and it does
        # not count.
        encoded = tokenizer(rendered(chat), add_special_tokens=False, return_offsets_mapping=True)
        tokens, spans = encoded.input_ids, spans_of_the_assistant(chat)
        whole = rendered(chat).removeprefix("<|end|>")
        size += len("".join(rendered(chat)[a:b] for a, b in spans) if assistant_only else whole)
        for target in range(1, len(tokens)):
            start, _ = encoded.offset_mapping[target]
            if assistant_only and not any(a <= start < b for a, b in spans):
                continue
            end = min(24 + math.ceil(max(target - 24, 0) / 5) * 5, len(tokens) - 1)
            with torch.no_grad():
                logits = model(torch.tensor([tokens[max(end - 24, 0) : target]])).logits[0, -1]
            nats += F.cross_entropy(logits, torch.tensor(tokens[target])).item()
            count += 1
    assert result.num_tokens == count
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.num_bytes == size


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("first", ["user", "assistant"])
def test_a_beginning_that_the_template_writes_does_not_count(
    wide: Path, tokenizer: PreTrainedTokenizerFast, first: str, assistant_only: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(wide).eval()
    chats = [[{"role": first, "content": "Sentence 3 says"}, {"role": "assistant", "content": "3 times 3 is 9."}]]
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    found = []
    for beginning in ("", "{{ bos_token }}"):
        tokenizer.chat_template = beginning + template
        result = evaluate(model, tokenizer, render(tokenizer, chats, assistant_only))
        validation = cut_windows(ValidationText(chats, "data", None), tokenizer, assistant_only, 128, 64)
        assert (validation.num_tokens, validation.num_bytes) == (result.num_tokens, result.num_bytes)
        found.append((result.nats, result.num_tokens, result.num_bytes))
    assert found[0] == found[1]


@pytest.mark.parametrize("assistant_only", [False, True])
def test_training_takes_the_loss_of_each_token_or_of_the_assistant(
    tokenizer: PreTrainedTokenizerFast, chat_file: Path, assistant_only: bool
) -> None:
    options = DataOptions(train_file=str(chat_file), validation_share=0.0, assistant_only=assistant_only)
    rows, validation = load_text(options)
    assert validation is None
    blocks = pack(rows, tokenizer, 64, options)
    tokens = [token for row in blocks["input_ids"] for token in row]
    text = "".join(rendered(chat) for chat in CHATS)
    assert tokenizer.decode(tokens) == tokenizer.decode(tokenizer(text).input_ids[: len(tokens)])
    labels = [label for row in blocks["labels"] for label in row]
    if not assistant_only:
        assert labels == tokens
        return
    expected = "".join(rendered(chat)[a:b] for chat in CHATS for a, b in spans_of_the_assistant(chat))
    learned = tokenizer.decode([label for label in labels if label != -100])
    assert expected.startswith(learned)
    assert len(learned) > 0.9 * len(expected)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_part_has_no_keys_of_other_parts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str) -> None:
    """Arrow gives the parts of all messages the same keys; a template sees only those with a value."""
    tokenizer.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '[image]' if 'image' in part else part['text'] }}"
        "{% if 'tool' in part %}{{ part['tool'] | length }}{% endif %}{% endfor %}{% endfor %}"
    )
    parts: list[dict[str, Any]] = [{"text": "Sentence"}, {"image": "a.png"}]
    parts += [{"text": " 3", "tool": {"a": 1}}, {"text": " 4", "tool": {"b": 1}}]
    rows = [{"messages": [{"role": "user", "content": [part]}]} for part in parts]
    file = tmp_path / f"parts{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    expected = ["Sentence", "[image]", " 31", " 41"]
    assert [row.text for row in render(tokenizer, read_texts(file), assistant_only=False)] == expected
    expected_tokens = [token for text in expected for token in tokenizer(text).input_ids]
    for streaming in (False, True):
        options = DataOptions(train_file=str(file), validation_share=0.0, streaming=streaming)
        tokens = [token for row in pack(load_text(options)[0], tokenizer, 2, options) for token in row["input_ids"]]
        assert tokens == expected_tokens[: len(expected_tokens) // 2 * 2]


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_template_gets_the_tools_of_a_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, assistant_only: bool, as_json: bool
) -> None:
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool['name'] }}{{ tool['arguments'] | length }}\n{% endfor %}"
        + tokenizer.chat_template
    )
    tools: list[Any] = [[{"name": "says", "arguments": {"a": 1}}, {"name": "plus", "arguments": {"b": 1}}], None]
    rows = [
        {"messages": chat, "tools": json.dumps(given) if as_json and given else given}
        for chat, given in zip(CHATS, tools * 15, strict=True)
    ]
    file = tmp_path / "tools.parquet"
    Dataset.from_list(rows).to_parquet(file)
    heads = ["says1\nplus1\n", ""]
    texts = [head + rendered(chat) for chat, head in zip(CHATS, heads * 15, strict=True)]
    chats = render(tokenizer, read_texts(file), assistant_only)
    assert [chat.text for chat in chats] == texts
    if assistant_only:
        spans = spans_of_the_assistant(CHATS[0])
        assert chats[0].turns == [(a + len(heads[0]), b + len(heads[0])) for a, b in spans]
    options = DataOptions(train_file=str(file), validation_share=0.0, assistant_only=assistant_only)
    tokens = [token for row in pack(load_text(options)[0], tokenizer, 64, options)["input_ids"] for token in row]
    assert tokenizer.decode(tokenizer("".join(texts)).input_ids).startswith(tokenizer.decode(tokens))


def test_a_training_set_without_the_assistant_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "users.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat[:1]}) for chat in CHATS))
    options = DataOptions(train_file=str(file), validation_share=0.0, assistant_only=True)
    rows, _ = load_text(options)
    with pytest.raises(ValueError, match="--assistant-only: expected turns of the assistant in the training set"):
        pack(rows, tokenizer, 16, options)


def test_a_validation_set_without_the_assistant_is_named(wide: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chats = [chat[:1] for chat in CHATS]
    message = "--assistant-only: expected turns of the assistant in the text, given none"
    with pytest.raises(ValueError, match=message):
        cut_windows(ValidationText(chats, "data", None), tokenizer, True, 16, 8)
    with pytest.raises(ValueError, match=message):
        evaluate(AutoModelForCausalLM.from_pretrained(wide).eval(), tokenizer, render(tokenizer, chats, True))


@pytest.mark.parametrize(
    ("tools", "given"), [('[{"name"', "broken JSON in row 1: "), ('{"name": "says"}', "a value of type dict in row 1")]
)
def test_tools_that_are_no_list_are_named(tmp_path: Path, tools: str, given: str) -> None:
    file = tmp_path / "tools.jsonl"
    rows = [{"messages": CHATS[0], "tools": each} for each in ("[]", tools)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"expected a list or its JSON in column 'tools', given {given}"):
        read_texts(file)


def test_the_commands_take_messages(wide: Path, chat_file: Path, tmp_path: Path) -> None:
    def run(*arguments: Any) -> str:
        result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    out = tmp_path / "out"
    options = ["--validation-file", chat_file, "--block-size", 32, "--use-cpu", "--report-to", "none"]
    options += ["--max-steps", 2, "--disable-tqdm", "true", "--assistant-only", "--output-dir", out]
    run("train", "--model", wide, "--train-file", chat_file, *options)
    metrics = json.loads((out / "eval_results.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    expected = evaluate(model, tokenizer, render(tokenizer, CHATS, True), window=32, stride=16)
    assert metrics["eval_loss"] == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert "the assistant's turns alone" in (out / "README.md").read_text()
    assert f"{expected.num_tokens:,}" in run("evaluate", out, "--validation-file", chat_file, "--assistant-only")
    page = tmp_path / "page.html"
    run("inspect", out, "--validation-file", chat_file, "--max-tokens", 100, "--html", page)
    text = html.unescape(re.sub("<[^>]+>", "", page.read_text(encoding="utf-8")))
    assert "<|end|>user↵\nSentence 0 says that<|end|>↵" in text
