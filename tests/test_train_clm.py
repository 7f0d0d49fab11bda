"""Runs `examples/train_clm.py` from the command line and checks its results."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_mos import MoSForCausalLM
from hf_mos.tools import train

SCRIPT = Path(__file__).parents[1] / "examples" / "train_clm.py"
END = "<|end|>"
SENTENCES = [f"Sentence {i} says that {i} times {i} is {i * i}, and {i} plus one is {i + 1}." for i in range(400)]
QUICK = ["--use-cpu", "--report-to", "none", "--disable-tqdm", "true", "--block-size", "32", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sentences.txt"
    file.write_text("\n".join(SENTENCES))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=300, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **special)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train_clm() -> ModuleType:
    return train


@pytest.fixture
def run(train_clm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls the script's main in this process."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def run(*options: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["train_clm.py", *QUICK, *map(str, options)])
        train_clm.main()

    return run


def run_script(tmp_path: Path, launcher: list[str], *options: Any) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    command = [*launcher, str(SCRIPT), *map(str, options)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_help_names_the_options(tmp_path: Path) -> None:
    printed = run_script(tmp_path, [sys.executable], "--help")
    assert {"--num-mixtures", "--train-file", "--dataset-name", "--push-to-hub"} <= set(
        printed.replace(",", " ").split()
    )


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([sys.executable, "-W", "error"], id="python"),
        pytest.param(
            [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"], id="accelerate"
        ),
    ],
)
def test_trains_evaluates_and_saves(tmp_path: Path, base: Path, text_file: Path, launcher: list[str]) -> None:
    out = tmp_path / "out"
    options = ["--model", base, "--num-mixtures", 3, "--train-file", text_file, "--output-dir", out, "--max-steps", 4]
    run_script(tmp_path, launcher, *QUICK, *options)

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(model, MoSForCausalLM)
    assert model.config.num_mixtures == 3
    metrics = json.loads((out / "all_results.json").read_text())
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    validation = "\n".join(SENTENCES[-20:])  # the last twentieth of the lines
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(validation).input_ids
    blocks = torch.tensor(tokens[: len(tokens) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    card = ModelCard.load(out / "README.md")
    assert card.data.eval_results[0].metric_value == round(metrics["perplexity"], 3)
    assert "--num-mixtures 3" in card.text


def test_resumes_bit_for_bit(tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]) -> None:
    options = ["--model", base, "--train-file", text_file, "--max-steps", 6, "--save-steps", 3]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(*options, "--output-dir", whole)
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    run(*options, "--output-dir", resumed, "--resume-from-checkpoint", "last")
    expected, found = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    start = load_file(whole / "checkpoint-3" / "model.safetensors")
    assert not all(torch.equal(expected[name], start[name]) for name in expected)


def test_trains_a_mixture_on(tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    data = ["--train-file", text_file, "--max-steps", 3]
    run("--model", base, "--num-mixtures", 2, "--latent-rank", 4, "--output-dir", first, *data)
    run("--model", first, "--output-dir", second, *data)
    model = AutoModelForCausalLM.from_pretrained(second)
    assert (model.config.num_mixtures, model.config.latent_rank) == (2, 4)
    losses = [json.loads((out / "eval_results.json").read_text())["eval_loss"] for out in (first, second)]
    assert losses[1] < losses[0]
    with pytest.raises(ValueError, match="--num-mixtures: the model has 2, given 5"):
        run("--model", first, "--num-mixtures", 5, "--output-dir", second, *data)


def test_new_weights_and_the_softmax_to_compare(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    source = ["--from-scratch", base / "config.json", "--tokenizer", base]
    for head, kind in (("mixture", MoSForCausalLM), ("softmax", LlamaForCausalLM)):
        run(*source, "--head", head, "--train-file", text_file, "--output-dir", tmp_path / head, "--max-steps", 1)
        assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / head), kind)


def test_rows_of_a_dataset_end_with_the_end_token(
    tmp_path: Path, base: Path, train_clm: ModuleType, run: Callable[..., None]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, texts in (("train", SENTENCES[:300]), ("validation", SENTENCES[300:])):
        rows = [json.dumps({"passage": text, "source": "arithmetic"}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    options = train_clm.DataOptions(dataset_name=str(folder), text_column="passage")
    tokenizer = AutoTokenizer.from_pretrained(base)
    blocks = train_clm.pack(train_clm.load_text(options), tokenizer, 16, options)
    tokens = [token for row in blocks["train"]["input_ids"] for token in row]
    assert tokenizer.decode(tokens).startswith(END.join(SENTENCES[:20]))
    assert blocks["train"]["labels"][:3] == blocks["train"]["input_ids"][:3]
    data = ["--dataset-name", folder, "--text-column", "passage"]
    run("--model", base, *data, "--output-dir", tmp_path / "out", "--max-steps", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train-file TEXT", "expected --model or --from-scratch, one of the two, given neither"),
        ("--model BASE", "expected --train-file or --dataset-name, one of the two, given neither"),
        ("--model BASE --train-file TEXT --dataset-name x", "given both"),
        ("--model BASE --train-file missing.txt", "--train-file: expected a file, given 'missing.txt'"),
        ("--model BASE --train-file BASE/config.yaml", "--train-file: expected"),
        ("--model BASE --train-file TEXT --block-size 65", "--block-size: expected at most the model's 64 positions"),
        ("--model BASE --train-file TEXT --block-size 1", "--block-size: expected at least 2 tokens, given 1"),
        ("--model BASE --train-file TEXT --num-mixtures 0", "num_mixtures: expected an int of at least 1, given 0"),
        ("--model BASE --train-file TEXT --tp-size 2", "--tp-size, --fsdp-size: expected a --model that has a"),
        ("--model BASE --train-file TEXT --validation-share 2", r"--validation-share: expected a number in \[0, 1\)"),
        ("--model BASE --train-file TEXT --text-column words", r"--text-column: expected one of \['text'\]"),
        ("--model BASE --train-file TEXT --head softmax --num-mixtures 2", "--head softmax: expected no options"),
        ("--from-scratch BASE --train-file TEXT", "--tokenizer: expected a path or Hub id with --from-scratch"),
        ("--model BASE --train-file TEXT --resume-from-checkpoint last", "expected a whole checkpoint in .*, found"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None], options: str, message: str
) -> None:
    places = {"BASE": str(base), "TEXT": str(text_file)}
    words = options.split()
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    with pytest.raises(ValueError, match=message):
        run("--output-dir", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_too_little_text_is_named(tmp_path: Path, base: Path, run: Callable[..., None]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Two words.\n")
    data = ["--train-file", short, "--validation-share", 0]
    with pytest.raises(ValueError, match=r"expected at least 32 tokens \(--block-size\) in the train set"):
        run("--model", base, *data, "--output-dir", tmp_path / "out")
