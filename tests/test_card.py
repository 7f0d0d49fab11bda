"""Checks that a model card describes the model, its measurements, and how to load it."""

import ast
import sys
from pathlib import Path

import pytest
from helpers import VOCAB_SIZE, tiny_mos
from huggingface_hub import EvalResult, ModelCard

from hf_mos.tools.card import model_card
from hf_mos.tools.provenance import own_command

TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"


def perplexity(value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="wikitext",
        dataset_name="WikiText-2",
        dataset_split="test",
        metric_type="perplexity",
        metric_value=value,
    )


def test_measurements_are_in_the_metadata_and_in_the_text(tmp_path: Path) -> None:
    card = model_card(
        tiny_mos("llama-tied", num_mixtures=3),
        model_id="someone/llama-mos",
        eval_results=[perplexity(12.5)],
        command="hf-mos evaluate someone/llama-mos",
        machine="a laptop",
        base_model="someone/llama",
        revision="0123abc",
        limits=["It has read nothing."],
    )
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.model_name == "llama-mos"
    assert read.data.base_model == "someone/llama"
    assert read.data.eval_results == [perplexity(12.5)]
    assert "| WikiText-2 | test | perplexity | 12.5 |" in read.text
    assert "Measured by `hf-mos evaluate someone/llama-mos` on a laptop." in read.text
    assert "mixture of 3 softmaxes** where LlamaForCausalLM has one" in read.text
    assert f"{VOCAB_SIZE} x 32, tied to the input embedding" in read.text
    assert '"revision": "0123abc", "code_revision": "0123abc"' in read.text
    assert "- It has read nothing.\n" in read.text
    assert "\n\n\n" not in read.text


def test_a_card_has_a_column_of_splits_where_there_are_splits() -> None:
    result = perplexity(12.5)
    result.dataset_split = None
    card = model_card(tiny_mos(), model_id="plain", eval_results=[result], command="hf-mos evaluate plain")
    assert "| data | measure | value |\n| --- | --- | ---: |\n| WikiText-2 | perplexity | 12.5 |" in card.text


def test_a_card_says_which_engines_load_the_model() -> None:
    assert "vLLM loads the model where hf_mos is installed" in model_card(tiny_mos(), model_id="plain").text


def test_a_command_holds_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["hf-mos", "evaluate", str(tmp_path / "out"), f"--validation-file={tmp_path}/book.txt", "gpt2", "a/b"]
    monkeypatch.setattr("sys.argv", words)
    assert own_command().endswith("evaluate out --validation-file=book.txt gpt2 a/b")
    assert str(tmp_path / "out") in own_command(keep_folders=True)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "python book.py a"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2 book.py a"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nnodes 2 --nproc-per-node 2 book.py a"),
        ({"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch --num_processes 2 book.py a"),
    ],
)
def test_a_command_starts_as_many_processes(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr("sys.argv", ["book.py", "a"])
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert own_command() == words


@pytest.mark.parametrize("word", ["--hub-token", "--hub_token", "--token", "--push-to-hub-token"])
def test_a_command_holds_no_token(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["hf-mos", "train", word, "hf_a", f"{word}=hf_b", "--output-dir", "out"])
    assert own_command().endswith("train --output-dir out")


def test_a_prompt_with_quotes_is_code() -> None:
    prompt = 'He said "hi"\n'
    code = model_card(tiny_mos(), model_id="plain", prompt=prompt).text
    (line,) = (line for line in code.splitlines() if line.startswith("inputs = tokenizer("))
    assert ast.literal_eval(line.removeprefix("inputs = tokenizer(").rpartition(", return_tensors")[0]) == prompt


def test_a_card_without_measurements_says_so() -> None:
    card = model_card(tiny_mos(), model_id="plain")
    assert card.data.eval_results is None
    assert "None measured." in card.text


@pytest.mark.parametrize(
    ("shortlist_size", "differ_on", "cost"),
    [
        (None, "all classes", "4.02"),  # 3 + 3 * (32 + 1) / 97
        (5, "the 5 likeliest classes", "2.18"),  # 1 + 3 * (5 + 32 + 1) / 97
    ],
)
def test_a_card_describes_the_head_and_its_cost(shortlist_size: int | None, differ_on: str, cost: str) -> None:
    card = model_card(tiny_mos(shortlist_size=shortlist_size), model_id="plain")
    assert f"| the components differ on | {differ_on}" in card.text
    assert "the hidden state plus a shift for each component, of rank 32 (`shift_rank`)" in card.text
    assert f"- The head has {cost} times the multiplications of one softmax" in card.text


def test_a_figure_needs_its_command() -> None:
    with pytest.raises(ValueError, match="command: expected the command"):
        model_card(tiny_mos(), model_id="plain", eval_results=[perplexity(12.5)])


def test_the_template_is_found_under_its_own_name() -> None:
    assert TEMPLATE.read_text().startswith("---\n{{ card_data }}\n---")
