"""The head's flags: each option of a conversion is a flag of every command, from one place, and what a head costs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_causal_lm, tiny_mos
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hf_mos.tools.cli import app
from hf_mos.tools.exit_codes import OptionError
from hf_mos.tools.head_options import Flag, head_cost, head_flags
from hf_mos.tools.train_options import parse_options

VALUES: list[tuple[str, Any]] = [
    ("num_mixtures", 3),
    ("shortlist_size", 5),
    ("shortlist_size", None),
    ("shift_rank", 8),
    ("latent_scale", 2.0),
    ("init_seed", 7),
    ("tie_word_embeddings", False),
]


def words_of(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", "all" if value is None else str(value)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_causal_lm("llama-tied").save_pretrained(folder)
    return folder


def convert(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_every_option_of_the_head_is_tested_here() -> None:
    defaults = {flag.name: flag.default for flag in head_flags()}
    expected = {"num_mixtures": 16, "shortlist_size": 64, "shift_rank": None, "latent_scale": None, "init_seed": 0}
    assert defaults == expected | {"tie_word_embeddings": None}
    assert defaults.keys() == dict(VALUES).keys()


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_a_flag_of_convert_reaches_the_checkpoint(name: str, value: Any, model: Path, tmp_path: Path) -> None:
    result = convert(model, tmp_path / "out", *words_of(name, value))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())[name] == value


@pytest.mark.parametrize("vocab_size", [97, 4096])
def test_convert_without_a_flag_makes_the_default_head(vocab_size: int, tmp_path: Path) -> None:
    tiny_causal_lm("llama", vocab_size=vocab_size).save_pretrained(tmp_path / "model")
    result = convert(tmp_path / "model", tmp_path / "out")
    assert "16, on a shortlist of 64 classes" in result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_mixtures"], config["shortlist_size"]) == (16, 64)


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_a_flag_of_train_reaches_the_options(name: str, value: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("text")
    start = ["--model", str(model), "--train-file", str(file), "--output-dir", str(tmp_path / "out")]
    options, _, _ = parse_options([*start, *words_of(name, value)])
    assert options.head_options == {name: value}
    assert parse_options(start)[0].head_options == {}
    with pytest.raises(ValueError, match="--head softmax: expected no options"):
        parse_options([*start, "--head", "softmax", *words_of(name, value)])


@pytest.mark.parametrize("flag", head_flags(), ids=lambda flag: flag.name)
def test_both_commands_explain_a_flag_in_the_same_words(
    flag: Flag, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = " ".join(CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "400"}).output.split())
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    name = f"--{flag.name.replace('_', '-')}"
    words = [name if flag.metavar is None else f"{name} {flag.metavar}", flag.help]
    assert all(word in text for text in (shown, printed) for word in words)
    if flag.default is not None:
        assert f"{flag.help} (default: {flag.default})" in printed


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_mixtures", 0), ("shortlist_size", 0), ("shortlist_size", "None"), ("shift_rank", 0), ("latent_scale", 0.0)],
)
def test_a_value_out_of_range_is_a_wrong_command_line(name: str, value: Any, tmp_path: Path) -> None:
    result = convert("missing", tmp_path / "out", *words_of(name, value))
    assert result.exit_code == 2
    (tmp_path / "text.txt").write_text("text")
    start = ["--model", "missing", "--train-file", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(OptionError, match=f"{name}: expected"):
        parse_options([*start, *words_of(name, value)])


def test_train_refuses_an_abbreviation_and_a_missing_output_folder(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("text")
    start = ["--model", str(model), "--train-file", str(file)]
    with pytest.raises(OptionError, match=r"required: --output-dir$"):
        parse_options(start)
    with pytest.raises(OptionError, match=r"--learning-rat: .*closest is --learning-rate"):
        parse_options([*start, "--output-dir", str(tmp_path / "out"), "--learning-rat", "1"])


@pytest.mark.parametrize("shift_rank", [1, 8, 32, 40])
@pytest.mark.parametrize(("num_mixtures", "shortlist_size"), [(1, None), (4, None), (2, 5), (16, 5), (3, 97)])
def test_the_cost_of_a_head_is_what_torch_counts(
    num_mixtures: int, shortlist_size: int | None, shift_rank: int
) -> None:
    D, V, tokens = 32, 97, random_tokens(4)
    options = {"num_mixtures": num_mixtures, "shortlist_size": shortlist_size, "shift_rank": shift_rank}
    softmax, mixture = tiny_causal_lm(), tiny_mos(**options)
    of_softmax = 2 * tokens.numel() * D * V

    def count(model: Any, **inputs: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens, **inputs)
        return counter.get_total_flops()

    sizes = {"hidden_size": D, "vocab_size": V}
    assert head_cost(**options, **sizes) == pytest.approx(1 + (count(mixture) - count(softmax)) / of_softmax)
    trained = count(mixture, shift_labels=tokens, skip_logits=True) - count(softmax)
    cost = head_cost(**options, **sizes, num_tokens=tokens.numel())
    assert cost == pytest.approx(1 + trained / of_softmax)


def test_the_cost_of_the_default_head_of_a_model_that_people_use() -> None:
    llama = {"hidden_size": 4096, "vocab_size": 128256}  # Llama-3-8B
    assert head_cost(16, 64, 64, **llama) == pytest.approx(1.024, abs=1e-3)
    assert head_cost(16, 64, 64, **llama, num_tokens=4096) == pytest.approx(1.025, abs=1e-3)
