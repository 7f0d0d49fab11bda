"""The head's flags: each field of MoSConfig that a conversion may set is a flag of every command, from one place."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_causal_lm
from typer.testing import CliRunner

from hf_mos import MoSConfig
from hf_mos.tools.cli import app
from hf_mos.tools.exit_codes import OptionError
from hf_mos.tools.head_options import head_fields
from hf_mos.tools.train_options import parse_options

VALUES: dict[str, Any] = {
    "num_mixtures": 3,
    "latent_rank": 4,
    "shortlist_size": 5,
    "latent_scale": 2.0,
    "latent_activation": "tanh",
    "latent_bias": True,
    "prior_bias": True,
    "latent_dropout": 0.25,
    "balance_coefficient": 0.5,
    "tie_word_embeddings": False,
}


def flag_of(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_causal_lm("llama-tied").save_pretrained(folder)
    return folder


def convert(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_every_field_of_the_head_has_a_help_text_and_is_tested_here() -> None:
    own = {field.name for field in dataclasses.fields(MoSConfig)} & set(MoSConfig.__annotations__) - {"text_config"}
    described = {field.name for field in dataclasses.fields(MoSConfig) if field.metadata.get("help")}
    assert described == own
    assert {field.name for field in head_fields()} == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_of_convert_reaches_the_checkpoint(name: str, model: Path, tmp_path: Path) -> None:
    result = convert(model, tmp_path / "out", *flag_of(name, VALUES[name]))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())[name] == VALUES[name]


def test_convert_without_a_flag_of_the_head_makes_the_cheapest_mixture(tmp_path: Path) -> None:
    tiny_causal_lm("llama", vocab_size=4096).save_pretrained(tmp_path / "model")
    result = convert(tmp_path / "model", tmp_path / "out")
    assert "16, on a shortlist of 64 classes" in result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_mixtures"], config["shortlist_size"]) == (16, 64)


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_of_train_reaches_the_options(name: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("text")
    start = ["--model", str(model), "--train-file", str(file), "--output-dir", str(tmp_path / "out")]
    options, _, _ = parse_options([*start, *flag_of(name, VALUES[name])])
    assert options.head_options == {name: VALUES[name]}
    assert parse_options(start)[0].head_options == {}
    with pytest.raises(ValueError, match="--head softmax: expected no options"):
        parse_options([*start, "--head", "softmax", *flag_of(name, VALUES[name])])


@pytest.mark.parametrize("field", head_fields(), ids=lambda field: field.name)
def test_both_commands_explain_a_flag_in_the_same_words(
    field: dataclasses.Field, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    help_text = field.metadata["help"]
    flag = f"--{field.name.replace('_', '-')}"
    shown = " ".join(CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "400"}).output.split())
    assert flag in shown
    assert help_text in shown
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert flag in printed
    assert help_text in printed


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_mixtures", 0), ("latent_rank", 0), ("latent_dropout", 1.0), ("latent_activation", "relu")],
)
def test_a_value_out_of_range_is_a_wrong_command_line(name: str, value: Any, tmp_path: Path) -> None:
    result = convert("missing", tmp_path / "out", *flag_of(name, value))
    assert result.exit_code == 2


def test_train_refuses_an_abbreviation_and_a_missing_output_folder(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("text")
    start = ["--model", str(model), "--train-file", str(file)]
    with pytest.raises(OptionError, match=r"required: --output-dir$"):
        parse_options(start)
    with pytest.raises(OptionError, match=r"--learning-rat: .*closest is --learning-rate"):
        parse_options([*start, "--output-dir", str(tmp_path / "out"), "--learning-rat", "1"])
