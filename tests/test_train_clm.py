"""Runs `examples/train_clm.py` from the command line and checks its results."""

import dataclasses
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from fresh_processes import PROGRAMS, fork_server
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer, SentencePieceBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hf_mos import MoSConfig, MoSForCausalLM
from hf_mos.tools import blocks, train
from hf_mos.tools.blocks import PIECE, cut_windows, load_text, pack
from hf_mos.tools.evaluate import evaluate
from hf_mos.tools.exit_codes import OptionError
from hf_mos.tools.train_options import DataOptions, parse_options

STATE = "trainer_state.json"
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


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Does in this process what the script does."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def run(*options: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["train_clm.py", *QUICK, *map(str, options)])
        train.train(*parse_options())

    return run


def run_script(tmp_path: Path, *options: Any, warnings_are_errors: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs the script in a fresh process that has imported transformers already."""
    return fork_server(*PROGRAMS).run(
        str(SCRIPT),
        *options,
        kind="script",
        cwd=tmp_path,
        environment={"HF_HOME": str(tmp_path / "home")},
        warnings_are_errors=warnings_are_errors,
    )


def test_help_names_the_options(tmp_path: Path) -> None:
    printed = run_script(tmp_path, "--help").stdout
    words = printed.replace(",", " ").split()
    assert {"--num-mixtures", "--train-file", "--dataset-name", "--push-to-hub", "--output-dir"} <= set(words)
    assert printed.index("Examples:") < printed.index("the model:")
    options = re.findall(r"^  (--[\w-]+)", printed, flags=re.MULTILINE)
    assert len(options) == len(set(options))  # each once
    assert not any("_" in word for word in words if word.startswith("--"))
    assert "default: None" not in printed
    assert "(default: 16)" in printed  # of num_mixtures
    assert printed.count("\n") < 170
    whole = run_script(tmp_path, "--help-all").stdout
    every = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainingArguments) if field.init}
    assert every <= set(re.findall(r"^  (--[\w-]+)", whole, flags=re.MULTILINE))


def test_a_wrong_option_is_exit_code_2(tmp_path: Path) -> None:
    process = run_script(tmp_path, "--model", "x", "--train-file", "none.txt", "--output-dir", "out")
    assert process.returncode == 2
    assert process.stderr.strip().endswith("--train-file: expected a file, given 'none.txt', which is none")


@pytest.mark.parametrize("launcher", ["python", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_trains_evaluates_and_saves(tmp_path: Path, base: Path, text_file: Path, launcher: str) -> None:
    out = tmp_path / "out"
    options = ["--model", base, "--num-mixtures", 3, "--train-file", text_file, "--output-dir", out, "--max-steps", 4]
    if launcher == "python":
        process = run_script(tmp_path, *QUICK, *options, warnings_are_errors=True)
    else:
        process = fork_server(*PROGRAMS).run(
            "accelerate.commands.launch",
            *("--cpu", "--num_processes", 1, SCRIPT, *QUICK, *options),
            kind="module",
            cwd=tmp_path,
            environment={"HF_HOME": str(tmp_path / "home")},
        )
    assert process.returncode == 0, process.stderr

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(model, MoSForCausalLM)
    assert model.config.num_mixtures == 3
    metrics = json.loads((out / "all_results.json").read_text())
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    validation = "\n".join(SENTENCES[-20:])  # the last twentieth of the lines
    expected = evaluate(model, AutoTokenizer.from_pretrained(out), [validation], window=32, stride=16)
    assert metrics["eval_loss"] == pytest.approx(expected.nats_per_token, rel=1e-5)
    card = ModelCard.load(out / "README.md")
    perplexity, bits = card.data.eval_results
    assert perplexity.metric_value == round(metrics["perplexity"], 3)
    assert perplexity.metric_name == "perplexity per token, window 32, stride 16"
    assert (perplexity.dataset_name, perplexity.dataset_split) == (
        "sentences.txt", "the last 5 % of the training text",
    )  # fmt: skip
    assert bits.metric_value == pytest.approx(expected.bits_per_byte, abs=1e-4)
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--latent-scale", 0.5], "--latent-scale: expected 2.0, as in the checkpoint to resume from, given 0.5"),
        (["--latent-scale", 2.0, "--shortlist-size", "all"], "--shortlist-size: expected 64, .*, given all"),
        (["--head", "softmax"], "--head: expected mixture, as in the checkpoint to resume from, given softmax"),
    ],
)
def test_a_resumed_run_has_the_head_of_its_checkpoint(
    changed: list[Any], message: str, tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    """The weights fit other options too, and would then be those of another model."""
    options = ["--model", base, "--train-file", text_file, "--save-steps", 1, "--output-dir", tmp_path]
    run(*options, "--latent-scale", 2.0, "--max-steps", 1)
    with pytest.raises(OptionError, match=message):
        run(*options, *changed, "--max-steps", 2, "--resume-from-checkpoint", "last")
    run(*options, "--latent-scale", 2.0, "--max-steps", 2, "--resume-from-checkpoint", "last")


def test_a_run_that_has_ended_is_finished_not_trained_on(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    """As after an interruption of the last evaluation, save or push."""
    options = ["--model", base, "--train-file", text_file, "--lr-scheduler-type", "constant", "--output-dir", tmp_path]
    for steps in (["--max-steps", 3], ["--num-train-epochs", 0.1]):
        shutil.rmtree(tmp_path)
        run(*options, *steps)
        expected, state = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / STATE).read_text())
        trained, results = (json.loads((tmp_path / f"{name}_results.json").read_text()) for name in ("train", "eval"))
        for name in ("model.safetensors", "eval_results.json", "README.md", STATE):
            (tmp_path / name).unlink()
        run(*options, *steps, "--resume-from-checkpoint", "last")
        found = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert json.loads((tmp_path / STATE).read_text())["global_step"] == state["global_step"]
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{state['global_step']}"]
        assert json.loads((tmp_path / "train_results.json").read_text()) == trained
        assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] == results["eval_loss"]
        assert (tmp_path / "README.md").is_file()


def test_a_checkpoint_without_its_optimizer_is_no_place_to_go_on(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    options = ["--model", base, "--train-file", text_file, "--output-dir", tmp_path, "--save-steps", 1]
    run(*options, "--save-only-model", "--max-steps", 1)
    for asked in ("last", tmp_path / "checkpoint-1"):
        with pytest.raises(OptionError, match=r"expected a checkpoint with its optimizer, given .*--save-only-model"):
            run(*options, "--max-steps", 2, "--resume-from-checkpoint", asked)


def test_no_file_of_a_run_holds_the_token(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The card and the file of the arguments are pushed."""
    options = ["--model", base, "--train-file", text_file, "--max-steps", 2, "--save-steps", 1]
    for index, words in enumerate((["--hub-token", "hf_Secret"], ["--hub_token=hf_Secret"])):
        run(*options, *words, "--output-dir", tmp_path / str(index))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"README.md", "training_args.bin"} <= {path.name for path in files}
    assert not [path for path in files if b"hf_Secret" in path.read_bytes()]
    assert "hf_Secret" not in capsys.readouterr().out


def test_the_best_checkpoint_has_the_lowest_perplexity(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    data = ["--model", base, "--train-file", text_file, "--max-steps", 3, "--save-steps", 1, "--output-dir", tmp_path]
    best = ["--eval-strategy", "steps", "--eval-steps", 1, "--load-best-model-at-end"]
    run(*data, *best, "--metric-for-best-model", "perplexity")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    measured = [entry["eval_perplexity"] for entry in state["log_history"] if "eval_perplexity" in entry]
    assert state["best_metric"] == min(measured) < max(measured)


def test_every_window_is_measured(tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]) -> None:
    """Also in a last batch that is not full; and the model is saved before it is measured."""
    options = ["--model", base, "--train-file", text_file, "--max-steps", 1]
    losses = []
    for more in ([], ["--dataloader-drop-last", "--per-device-eval-batch-size", 512]):
        out = tmp_path / str(len(losses))
        run(*options, *more, "--output-dir", out)
        losses.append(json.loads((out / "eval_results.json").read_text())["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_failing_evaluation_leaves_the_trained_model(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(train.CardTrainer, "evaluate", fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        run("--model", base, "--train-file", text_file, "--max-steps", 1, "--output-dir", tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), MoSForCausalLM)


def test_the_metrics_of_a_model_that_diverged_are_json(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    model = MoSForCausalLM.from_causal_lm(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    model.save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--tokenizer", base, "--train-file", text_file, "--max-steps", 1]
    run(*options, "--learning-rate", 0, "--output-dir", tmp_path / "out")
    for name in ("eval_results.json", "all_results.json"):
        metrics = json.loads((tmp_path / "out" / name).read_text(), parse_constant=pytest.fail)
        assert metrics["perplexity"] is None
        assert metrics["eval_loss"] > 709


def test_force_keeps_the_model_that_the_run_starts_from(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    data = ["--train-file", text_file, "--max-steps", 1, "--save-steps", 1, "--output-dir", tmp_path]
    run("--model", base, *data)
    for source in (tmp_path, tmp_path / "checkpoint-1"):
        with pytest.raises(OptionError, match="--output-dir: expected another folder than that of --model"):
            run("--model", source, *data, "--force")
    assert (tmp_path / "checkpoint-1").is_dir()


def test_force_leaves_no_file_of_the_former_model(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    """A chat template or an adapter would be loaded with the new model, and results be shown with it."""
    data = ["--model", base, "--train-file", text_file, "--max-steps", 1, "--output-dir", tmp_path]
    run(*data)
    names = ["chat_template.jinja", "adapter_config.json", "adapter_model.safetensors"]
    for name in [*names, "notes.md"]:
        (tmp_path / name).write_text("{}")
    run(*data, "--force", "--validation-share", 0)
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {*names, "eval_results.json"}
    assert "notes.md" in left
    assert "eval_loss" not in json.loads((tmp_path / "all_results.json").read_text())


def test_a_forced_run_that_is_resumed_leaves_no_file_of_the_former_model(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--model", base, "--train-file", text_file, "--max-steps", 2, "--save-steps", 1, "--output-dir", tmp_path]
    run(*data)
    (tmp_path / "chat_template.jinja").write_text("of the former model")

    whole = train.train_or_load

    def interrupted(*arguments: Any) -> None:
        whole(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_or_load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*data, "--force")
    assert (tmp_path / "chat_template.jinja").is_file()  # the former model is whole as long as there is no other
    run(*data, "--resume-from-checkpoint", "last")
    assert not (tmp_path / "chat_template.jinja").exists()
    assert {"eval_results.json", "README.md"} <= {path.name for path in tmp_path.iterdir()}


def test_too_few_blocks_for_a_batch(tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]) -> None:
    options = ["--model", base, "--train-file", text_file, "--output-dir", tmp_path, "--per-device-train-batch-size"]
    with pytest.raises(ValueError, match="--dataloader-drop-last: expected at least a batch, 5000 blocks, given"):
        run(*options, 5000, "--dataloader-drop-last")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_short_run_prints_its_loss(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The Trainer's own default prints the loss of every 500th step."""
    run("--model", base, "--train-file", text_file, "--max-steps", 11, "--output-dir", tmp_path / "out")
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 10]
    assert len(re.findall(r"'loss': ", capsys.readouterr().out)) == 2


def test_a_resumed_run_misses_no_tied_weight(
    tmp_path: Path,
    base: Path,
    text_file: Path,
    run: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint holds a tied weight under one of its names, so nothing is missing."""
    tied, out = tmp_path / "tied", tmp_path / "out"
    shutil.copytree(base, tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    LlamaForCausalLM(model.config).save_pretrained(tied)
    options = ["--model", tied, "--train-file", text_file, "--output-dir", out, "--save-steps", 1]
    run(*options, "--max-steps", 1)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    run(*options, "--max-steps", 2, "--resume-from-checkpoint", "last")
    assert MoSForCausalLM.from_pretrained(out).config.tie_word_embeddings
    assert "missing keys" not in caplog.text


def test_trains_a_mixture_on(tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    data = ["--train-file", text_file, "--max-steps", 3]
    run("--model", base, "--num-mixtures", 2, "--shortlist-size", "all", "--output-dir", first, *data)
    run("--model", first, "--shortlist-size", "all", "--no-tie-word-embeddings", "--output-dir", second, *data)
    with pytest.raises(OptionError, match="--tie-word-embeddings: expected False, as in the model, given True"):
        run("--model", first, "--tie-word-embeddings", "--output-dir", third, *data)
    model = AutoModelForCausalLM.from_pretrained(second)
    assert (model.config.num_mixtures, model.config.shortlist_size) == (2, None)
    losses = [json.loads((out / "eval_results.json").read_text())["eval_loss"] for out in (first, second)]
    assert losses[1] < losses[0]
    with pytest.raises(ValueError, match="--num-mixtures: expected 2, as in the model, given 5"):
        run("--model", first, "--num-mixtures", 5, "--output-dir", third, *data)
    with pytest.raises(ValueError, match="--shortlist-size: expected all, as in the model, given 64"):
        run("--model", first, "--shortlist-size", 64, "--output-dir", third, *data)


def test_new_weights_and_the_softmax_to_compare(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    source = ["--from-scratch", base / "config.json", "--tokenizer", base]
    for head, kind in (("mixture", MoSForCausalLM), ("softmax", LlamaForCausalLM)):
        run(*source, "--head", head, "--train-file", text_file, "--output-dir", tmp_path / head, "--max-steps", 1)
        assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / head), kind)


def test_new_weights_by_the_config_of_a_mixture(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    """The scale of the shifts is that of a new model, not that of the conversion."""
    data = ["--train-file", text_file, "--max-steps", 1]
    run("--model", base, "--num-mixtures", 3, *data, "--output-dir", tmp_path / "first")
    assert MoSConfig.from_pretrained(tmp_path / "first").latent_scale == 320 / 32
    source = ["--from-scratch", tmp_path / "first" / "config.json", "--tokenizer", base]
    for options, scale in (([], 3.2 / 32), (["--latent-scale", 0.5], 0.5)):
        out = tmp_path / str(scale)
        run(*source, *options, *data, "--output-dir", out)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert (model.config.num_mixtures, model.mos_head.latent_scale) == (3, pytest.approx(scale))


def test_rows_of_a_dataset_end_with_the_end_token(tmp_path: Path, base: Path, run: Callable[..., None]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, texts in (("train", SENTENCES[:300]), ("validation", SENTENCES[300:])):
        rows = [json.dumps({"passage": text, "source": "arithmetic"}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    options = DataOptions(dataset_name=str(folder), text_column="passage")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows, validation = load_text(options)
    assert (validation.rows, validation.split) == (SENTENCES[300:], "validation")
    blocks = pack(rows, tokenizer, 16, options)
    tokens = [token for row in blocks["input_ids"] for token in row]
    assert tokenizer.decode(tokens).startswith(END.join(SENTENCES[:20]))
    assert blocks["labels"][:3] == blocks["input_ids"][:3]
    data = ["--dataset-name", folder, "--text-column", "passage"]
    run("--model", base, *data, "--output-dir", tmp_path / "out", "--max-steps", 1)


def test_rows_of_a_dataset_begin_with_the_token_that_validation_begins_with(tmp_path: Path, base: Path) -> None:
    """Else a tokenizer with two tokens is measured on one that training never shows."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES[:100]))
    tokenizer = AutoTokenizer.from_pretrained(base, bos_token="<s>")
    options = DataOptions(train_file=str(file), validation_share=0.0)
    rows, _ = load_text(options)
    blocks = pack(rows, tokenizer, 16, options)
    tokens, labels = ([token for row in blocks[name] for token in row] for name in ("input_ids", "labels"))
    assert tokenizer.decode(tokens).startswith(END.join(f"<s>{text}" for text in SENTENCES[:20]))
    uncounted = {token for token, label in zip(tokens, labels, strict=True) if label == -100}
    assert uncounted == {tokenizer.bos_token_id}


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
        ("--model BASE --train-file TEXT --shortlist-size x", "shortlist_size: expected an int of at least 1, or all"),
        ("--model BASE --train-file TEXT --learning-rat 1", r"--learning-rat: expected .*closest is --learning-rate"),
        ("--model ./none --train-file TEXT", "model: expected a folder or a Hub id, given './none', which is neither"),
        ("--model BASE --train-file TEXT --tp-size 2", "--tp-size, --fsdp-size: expected a --model that has a"),
        ("--model BASE --train-file TEXT --validation-share 2", r"--validation-share: expected a number in \[0, 1\)"),
        ("--model BASE --train-file TEXT --learning-rate inf", r"--learning-rate: expected a number in \[0, .* inf"),
        ("--model BASE --train-file TEXT --weight-decay nan", r"--weight-decay: expected a number in \[0, .* nan"),
        ("--model BASE --train-file TEXT --logging-steps inf", r"--logging-steps: expected a number in \[0, .* inf"),
        ("--model BASE --train-file TEXT --seed -1", r"--seed: expected a number in \[0, 4294967296\), given -1"),
        (f"--model BASE --train-file TEXT --init-seed {2**64}", r"--init-seed: expected a number in \[0, "),
        (f"--model BASE --train-file TEXT --data-seed {2**63}", r"--data-seed: expected a number in \[0, "),
        (
            "--model BASE --train-file TEXT --gradient-accumulation-steps -1",
            r"--gradient-accumulation-steps: expected a number in \[1, .* given -1",
        ),
        (
            "--model BASE --train-file TEXT --per-device-eval-batch-size 0",
            r"--per-device-eval-batch-size: expected a number in \[1, .* given 0",
        ),
        (
            "--model BASE --train-file TEXT --label-smoothing-factor 2",
            r"--label-smoothing-factor: expected a number in \[0, 1\)",
        ),
        ("--model BASE --train-file TEXT --head softmax --num-mixtures 2", "--head softmax: expected no options"),
        ("--model BASE --train-file TEXT --freeze-decoder", "--freeze-decoder: expected with --freeze-backbone only"),
        (
            "--model BASE --train-file TEXT --freeze-backbone --head softmax",
            "--freeze-backbone: expected --head mixture",
        ),
        (
            "--model BASE --train-file TEXT --freeze-backbone --fsdp-size 2",
            "--freeze-backbone: expected no --streaming",
        ),
        (
            "--model BASE --train-file TEXT --freeze-backbone --neftune-noise-alpha 5",
            "--neftune-noise-alpha: expected none",
        ),
        ("--model BASE --train-file TEXT --batch-eval-metrics", "--batch-eval-metrics: expected False"),
        (
            "--model BASE --train-file TEXT --eval-strategy steps --validation-share 0",
            "--eval-strategy steps: expected --validation-file",
        ),
        ("--model BASE --train-file TEXT --eval-on-start --streaming --max-steps 1", "--eval-on-start: expected"),
        (
            "--model BASE --train-file TEXT --save-strategy best --metric-for-best-model loss",
            "--save-strategy best: expected with --eval-strategy and --metric-for-best-model, given no and loss",
        ),
        ("--model BASE --train-file TEXT --save-strategy best --eval-strategy epoch", "given epoch and None"),
        ("--model BASE --train-file TEXT --load-best-model-at-end --save-strategy no", "given no and loss"),
        ("--model BASE --train-file TEXT --metric-for-best-model bleu", "expected loss or perplexity, given bleu"),
        ("--model BASE --train-file TEXT --do-predict", "--do-predict: expected False"),
        (
            "--model BASE --train-file TEXT --train-sampling-strategy group_by_length",
            "--train-sampling-strategy: expected random or sequential",
        ),
        ("--model BASE --train-file TEXT --output-dir TEXT", "--output-dir: expected a folder, given"),
        ("--model BASE --train-file TEXT --output-dir TEXT/out", "--output-dir: expected a folder, given"),
        ("--model BASE --train-file TEXT --eval-do-concat-batches false", "--eval-do-concat-batches: expected True"),
        ("--from-scratch BASE --train-file TEXT", "--tokenizer: expected a folder or Hub id with --from-scratch"),
        (
            "--model BASE --train-file TEXT --resume-from-checkpoint last",
            "expected a whole checkpoint in .*, given none",
        ),
    ],
)
def test_bad_options_are_named_before_the_text_is_read(
    tmp_path: Path,
    base: Path,
    text_file: Path,
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    message: str,
) -> None:
    places = {"BASE": str(base), "TEXT": str(text_file)}
    words = options.split()
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    monkeypatch.setattr(train, "load_text", lambda options: pytest.fail("the text was read before the options"))
    with pytest.raises(OptionError, match=message):
        run("--output-dir", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_not_there_is_named(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    options = ["--model", base, "--train-file", text_file, "--text-column", "words", "--output-dir", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"text_column: expected one of \['text'\]"):
        run(*options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["data[1].jsonl", "data*.jsonl", "data?.jsonl", "book[1].txt", "book*.txt", "data.JSONL", "book.TXT"]
)
def test_the_name_of_a_file_is_no_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, streaming: bool
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "run[1]"
    folder.mkdir()
    for file, word in ((name, "right"), ("data1.jsonl", "wrong"), ("book1.txt", "wrong")):
        (folder / file).write_text(json.dumps({"text": word}) if file.lower().endswith("jsonl") else word)
    monkeypatch.chdir(folder)
    for file in (name, str(folder / name)):
        options = DataOptions(train_file=file, validation_file=file, validation_share=0.0, streaming=streaming)
        rows, validation = load_text(options)
        assert [row["text"] for row in rows] == validation.rows == ["right"]


PARAGRAPHS = "".join(f"{sentence}\n\n    {sentence}\n" for sentence in SENTENCES[:60])


def spanning_tokenizer(kind: str, text: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens span line ends, or one that puts a space before a text."""
    tokenizer: Any = {"byte level": ByteLevelBPETokenizer, "metaspace": SentencePieceBPETokenizer}[kind]()
    tokenizer.train_from_iterator([text], vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
@pytest.mark.parametrize(("share", "streaming"), [(0.0, False), (0.1, False), (0.0, True)])
def test_a_text_file_is_tokenized_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_end: str, kind: str, share: float, streaming: bool
) -> None:
    """Training and validation read the same characters and make the same tokens of them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    text = PARAGRAPHS.replace("\n", line_end)
    tokenizer = spanning_tokenizer(kind, text)
    file = tmp_path / "book.md"
    file.write_bytes(text.encode())
    held_out = None if share else str(file)
    options = DataOptions(
        train_file=str(file), validation_file=held_out, validation_share=share, streaming=streaming, block_size=2
    )
    rows, validation = load_text(options)
    (validated,) = validation.rows
    assert validated == ("".join(text.splitlines(keepends=True)[-18:]) if share else text)
    expected = tokenizer(text.removesuffix(validated) if share else text, add_special_tokens=False).input_ids
    tokens = [token for block in pack(rows, tokenizer, 2, options) for token in block["input_ids"]]
    assert tokens == expected[: len(expected) // 2 * 2]
    if kind == "byte level":
        by_line = [tokenizer(line).input_ids for line in text.splitlines(keepends=True)]
        assert sum(map(len, by_line)) > len(tokenizer(text).input_ids)  # some tokens do span line ends


@pytest.mark.parametrize("streaming", [False, True])
def test_a_long_text_file_is_read_in_pieces(
    tmp_path: Path, base: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """Only there are tokens cut apart or dropped."""
    assert PIECE > 1_000_000
    monkeypatch.setattr(blocks, "PIECE", 1000)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    options = DataOptions(train_file=str(text_file), validation_share=0.0, streaming=streaming)
    rows, _ = load_text(options)
    pieces = [row["text"] for row in rows]
    assert "".join(pieces) == text_file.read_text()
    assert all(1000 <= len(piece) < 1100 and piece.endswith("\n") for piece in pieces[:-1])
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = []
    for piece in pieces:
        tokens = tokenizer(piece).input_ids
        expected += [tokens[i : i + 16] for i in range(0, len(tokens) // 16 * 16, 16)]
    assert [block["input_ids"] for block in pack(rows, tokenizer, 16, options)] == expected


def test_a_row_of_a_stream_that_is_no_text_is_named(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in [*SENTENCES, None]))
    options = DataOptions(train_file=str(file), streaming=True)
    rows, _ = load_text(options)
    blocks_of_rows = pack(rows, AutoTokenizer.from_pretrained(base), 16, options)
    with pytest.raises(ValueError, match="expected text or messages in column 'text', given null in row 400"):
        list(blocks_of_rows)


def test_a_changed_text_file_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    file = tmp_path / "book.txt"
    fingerprints = []
    for text in ("first", "first", "other"):
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        rows, _ = load_text(DataOptions(train_file=str(file), validation_share=0.0))
        assert rows["text"][:] == [text]
        fingerprints.append(rows._fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_bytes_are_of_the_tokens_that_count(tmp_path: Path, kind: str) -> None:
    """Without a token to stand before a text, its first token does not count, nor do its bytes."""
    texts = [PARAGRAPHS[:300], "Sentence", "says that"]
    tokenizer = spanning_tokenizer(kind, PARAGRAPHS)
    validation = cut_windows(blocks.ValidationText(texts, "data", None), tokenizer, False, 16, 8)
    tokens = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts]
    assert validation.num_tokens == sum(len(encoded.input_ids) - 1 for encoded in tokens)
    assert validation.num_bytes == sum(
        len(text[encoded.offset_mapping[0][1] :]) for text, encoded in zip(texts, tokens, strict=True)
    )
    tokenizer.bos_token = "<unk>"
    with_prefix = cut_windows(blocks.ValidationText(texts, "data", None), tokenizer, False, 16, 8)
    assert with_prefix.num_tokens == validation.num_tokens + 3
    assert with_prefix.num_bytes == sum(map(len, texts))


def test_too_little_text_is_named(tmp_path: Path, base: Path, run: Callable[..., None]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Two words.\n")
    data = ["--train-file", short, "--validation-share", 0]
    with pytest.raises(ValueError, match="--block-size: expected at most the tokens of the training set, given 32"):
        run("--model", base, *data, "--output-dir", tmp_path / "out")


@pytest.mark.parametrize("decoder", [[], ["--freeze-decoder"]])
def test_a_frozen_backbone_runs_once(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None], decoder: list[str], capsys: Any
) -> None:
    out = tmp_path / "out"
    options = [
        "--model",
        base,
        "--train-file",
        text_file,
        "--max-steps",
        "3",
        "--save-steps",
        "2",
        "--output-dir",
        out,
    ]
    run(*options, "--num-mixtures", "3", "--freeze-backbone", *decoder)
    (file,) = (out / "_hidden_states").glob("*.safetensors")
    with safe_open(file, "pt") as states:
        blocks = states.get_slice("hidden_states").get_shape()[0] // 32
    assert f"{blocks * 32 * 32 * 4:,} bytes in {out}" in capsys.readouterr().err
    model, before = MoSForCausalLM.from_pretrained(out), MoSForCausalLM.from_causal_lm(str(base), num_mixtures=3)
    for ours, theirs in zip(model.model.parameters(), before.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert model.lm_head.shift.weight.abs().max() > 0
    assert torch.equal(model.lm_head.weight, before.lm_head.weight) == bool(decoder)
    metrics = json.loads((out / "all_results.json").read_text())
    text = text_file.read_text()
    assert metrics["perplexity"] < 1000
    assert text
    run(*options, "--num-mixtures", "3", "--freeze-backbone", *decoder, "--resume-from-checkpoint", "last")


def test_the_softmax_control_is_measured_and_trained_as_the_mixture_is(
    tmp_path: Path, base: Path, text_file: Path, run: Callable[..., None]
) -> None:
    """transformers divides the loss of GPT-2 and others by all labels, unless it is told what the loss is."""
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    found = []
    for head in ("softmax", "mixture"):
        out = tmp_path / head
        options = ["--model", tmp_path / "gpt2", "--tokenizer", base, "--train-file", text_file, "--max-steps", "2"]
        more = ["--learning-rate", "0", "--block-size", "16", "--logging-steps", "1", "--max-grad-norm", "0"]
        run(*options, *more, "--head", head, "--output-dir", out)
        logs = [e for e in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in e]
        metrics = json.loads((out / "all_results.json").read_text())
        found.append([metrics["perplexity"], logs[0]["loss"], logs[0]["grad_norm"]])
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-4)
    assert found[0][2] == pytest.approx(found[1][2], rel=0.2)  # the head's own gradients differ
