"""Checks the `hf-mos` command: its output, the files it writes, and its errors."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import typer
from architectures import tiny_config
from commands import run_command
from helpers import BACKBONES, LargestTensor, log_prob_gap, part_components, run_python, tiny_causal_lm, tiny_mos
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
)
from transformers.models.auto import modeling_auto
from typer.testing import CliRunner

import hf_mos
from hf_mos import MoSForCausalLM
from hf_mos.tools import cli, loading
from hf_mos.tools.card import eval_results
from hf_mos.tools.evaluate import choose_window, evaluate, positions_of
from hf_mos.tools.texts import load_rows, read_texts
from hf_mos.tools.train import CardTrainer
from hf_mos.training.callbacks import StopOnNonFiniteLoss

COMMANDS = ("convert", "export", "evaluate", "inspect", "train", "card", "push", "serve")


class Printed(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Calls the console script in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any) -> Printed:
        monkeypatch.setattr(sys, "argv", ["hf-mos", *map(str, arguments)])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # `python -m pytest` has one, hf-mos has none
        with pytest.raises(SystemExit) as exit:
            cli.run()
        return Printed(int(exit.value.code or 0), *capfd.readouterr())

    return run


# ----------------------------------------------------------------------------------------------------------- the whole


def test_version(run: Callable[..., Printed]) -> None:
    assert run("--version") == Printed(0, f"hf-mos {hf_mos.__version__}\n", "")


def test_help_names_the_commands(run: Callable[..., Printed]) -> None:
    printed = run("--help")
    assert printed.code == 0
    assert all(re.search(rf"\b{command}\b", printed.out) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(run: Callable[..., Printed], command: str) -> None:
    printed = run(command, "--help")
    assert printed.code == 0
    assert f"hf-mos {command} " in printed.out.replace(f"Usage: hf-mos {command} ", "")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "serve"])
def test_help_in_a_narrow_terminal_names_each_option_whole(command: str) -> None:
    narrow = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "80"}, terminal_width=80)
    assert "…" not in narrow.output
    if command != "train":  # which has a parser of its own
        for parameter in typer.main.get_command(cli.app).commands[command].params:
            assert all(re.search(rf"{name}\b", narrow.output) for name in parameter.opts if name.startswith("--"))


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("convert", 2, "Missing argument"),
        ("convert BASE OUT --num-mixtures 0", 2, "num_mixtures: expected an int of at least 1, given 0"),
        ("convert BASE OUT --num-softmaxes 3", 2, "--num-softmaxes"),
        ("convert BASE OUT --latent-scale 0", 2, "latent_scale: expected a finite number above 0, or None, given 0.0"),
        ("convert BASE OUT --shift-rank 33", 2, "shift_rank: expected at most the hidden size, 32, given 33"),
        (
            "train --model BASE --train-file TEXT --output-dir OUT --shift-rank 33",
            2,
            "shift_rank: expected at most the",
        ),
        (f"convert BASE OUT --num-mixtures {10**20}", 2, "--num-mixtures: expected a number in [0, "),
        (f"convert BASE OUT --init-seed {2**64}", 2, "--init-seed: expected a number in [0, 18446744073709551616)"),
        ("convert BASE OUT --shortlist-size 0", 2, "shortlist_size: expected an int of at least 1"),
        ("convert BASE OUT --shortlist-size few", 2, "expected an int of at least 1, or all, given 'few'"),
        ("convert OLD OUT", 2, "backbone_model_type: expected a model type that transformers knows, given None"),
        (
            "evaluate OLD --validation-file TEXT",
            2,
            "backbone_model_type: expected a model type that transformers knows",
        ),
        ("card OLD", 1, "backbone_model_type: expected a model type that transformers knows"),
        ("convert BASE OUT --dtype float12", 2, "dtype: expected 'auto' or a dtype of torch"),
        ("evaluate BASE --validation-file TEXT --dtype int8", 2, "dtype: expected 'auto' or a dtype of torch"),
        ("evaluate BASE --validation-file TEXT --dtype float8_e4m3fn", 2, "dtype: expected 'auto' or a dtype of"),
        ("evaluate BASE --validation-file TEXT --dtype complex64", 2, "dtype: expected 'auto' or a dtype of torch"),
        (
            "evaluate BASE --validation-file TEXT --prefix-token-id 99999",
            1,
            "prefix_token_id: expected a token below the model's 300, given 99999",
        ),
        ("convert BASE OUT --device cuda:99", 2, "device: expected one that torch can use, given 'cuda:99'"),
        ("convert BASE BASE", 2, "folder: expected another than the model's own"),
        ("convert BASE MIXTURE", 2, "which holds a checkpoint"),
        ("convert MIXTURE OUT", 2, "expected a causal LM with a softmax head"),
        ("convert ./none OUT", 2, "model: expected a folder or a Hub id, given './none', which is neither"),
        ("convert none/ OUT", 2, "model: expected a folder or a Hub id, given 'none/', which is neither"),
        ("convert BASE TEXT", 2, "folder: expected a folder, given"),
        ("convert BASE BELOW_TEXT", 2, "folder: expected a folder, given"),
        ("convert config.json OUT", 2, "given 'config.json', which is neither"),
        ("evaluate config.json --validation-file TEXT", 2, "given 'config.json', which is neither"),
        ("convert BASE OUT --max-shard-size 5", 2, "max_shard_size: expected a size such as 5GB"),
        ("export MIXTURE OUT --max-shard-size -5GB", 2, "max_shard_size: expected a size such as 5GB"),
        ("export BASE OUT", 2, "model: expected a mixture of softmaxes, given"),
        ("export MIXTURE BASE", 2, "which holds a checkpoint"),
        ("export ./none OUT", 2, "model: expected a folder or a Hub id, given './none', which is neither"),
        ("evaluate BASE", 2, "expected --validation-file or --dataset-name, one of the two, given neither"),
        ("evaluate BASE --validation-file TEXT --dataset-name x", 2, "given both"),
        ("evaluate BASE --validation-file ROWS --split x", 2, "--split: expected none with --validation-file, given"),
        (
            "evaluate BASE --validation-file ROWS --dataset-config-name x",
            2,
            "--dataset-config-name: expected none with --validation-file, given 'x'",
        ),
        (
            "evaluate BASE --validation-file TEXT --text-column x",
            2,
            "--text-column: expected none with a file of plain text, given 'x'",
        ),
        ("inspect MIXTURE --validation-file TEXT --text-column x", 2, "expected none with a file of plain text"),
        ("evaluate BASE --validation-file none.txt", 2, "--validation-file: expected a file, given 'none.txt'"),
        ("evaluate BASE --validation-file EMPTY", 1, "which is empty"),
        ("evaluate BASE --validation-file BYTES", 1, "file: expected UTF-8"),
        ("evaluate BASE --validation-file TEXT --window 129", 2, "at most the model's 128 positions, given 129"),
        ("evaluate BASE --validation-file TEXT --window 16 --stride 17", 2, "at most the window's 16, given 17"),
        (
            "evaluate BASE --validation-file ROWS --text-column words",
            1,
            "text_column: expected one of ['text'], given 'words'",
        ),
        (
            "evaluate BASE --validation-file CONVERSATIONS",
            1,
            "text_column: expected one of ['conversations'], given 'text'; --text-column names another",
        ),
        ("evaluate BASE --validation-file BROKEN", 1, "file: expected rows of .jsonl, given"),
        ("train --model BASE --output-dir out --train-file EMPTY_TXT", 1, "which is empty"),
        ("train --model BASE --output-dir out --train-file BYTES_TXT", 1, "file: expected UTF-8"),
        ("train --model BASE --output-dir out --train-file BROKEN", 1, "file: expected rows of .jsonl, given"),
        (
            "train --model BASE --output-dir out --train-file LINE",
            1,
            "--validation-share: expected at least 2 rows or lines for 0.05, --validation-file, or",
        ),
        ("convert ENCODER OUT", 2, "a BertConfig with is_decoder false: each of its tokens sees those after it"),
        ("train --model BASE --output-dir out", 2, "expected --train-file or --dataset-name"),
        ("train --model BASE --train-file TEXT", 2, "--output-dir"),
        ("evaluate BASE --file TEXT", 2, "--file: expected --validation-file"),
        ("convert BASE OUT --untie", 2, "--untie: expected --no-tie-word-embeddings"),
        ("card BASE", 2, "expected a mixture of softmaxes, given a 'llama'"),
        ("card OUT", 2, "no such folder"),
        ("card EMPTY", 2, "no such folder"),
        ("card MIXTURE --results TEXT", 1, "expected JSON"),
        ("card MIXTURE --results OUT", 2, "expected a file"),
        ("push OUT user/name", 2, "no such folder"),
        ("inspect OUT --text x", 2, "which is neither"),
        ("inspect BASE --text x", 2, "hf-mos convert makes one of it"),
        ("evaluate OUT --validation-file TEXT", 2, "which is neither"),
        ("evaluate none/at/all --validation-file TEXT", 2, "which is neither"),
        ("serve ./none", 2, "which is neither"),
        ("train --model OUT --train-file TEXT --output-dir OUT", 2, "which is neither"),
        ("train --model BASE --train-file TEXT --output-dir OUT --num-mixtures 0", 2, "num_mixtures: expected an int"),
        ("train --model BASE --train-file TEXT --output-dir OUT --shortlist-size few", 2, "or all, given 'few'"),
        ("train --model MIXTURE --train-file TEXT --output-dir MIXTURE", 2, "or --force, given"),
        ("mix", 2, "mix"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    run: Callable[..., Printed],
    base: Path,
    mixture: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    code: int,
    message: str,
) -> None:
    places = {"BASE": base, "MIXTURE": mixture, "TEXT": text_file, "OUT": tmp_path / "out"}
    for name, content in (("EMPTY", b""), ("BYTES", b"\xff\xfe"), ("ROWS.jsonl", b'{"text": "a b"}\n')):
        places[name.partition(".")[0]] = tmp_path / name
        (tmp_path / name).write_bytes(content)
    for name, content in (
        ("EMPTY_TXT", b""),
        ("BYTES_TXT", b"\xff\xfe"),
        ("LINE", b"One line."),
        ("BROKEN", b'{"text'),
        ("CONVERSATIONS", b'{"conversations": [{"role": "user", "content": "a"}]}'),
    ):
        places[name] = (tmp_path / name).with_suffix(".jsonl" if content[:1] == b"{" else ".txt")
        places[name].write_bytes(content)
    places["BELOW_TEXT"] = text_file / "out"
    places["ENCODER"] = tmp_path / "encoder"
    BertConfig().save_pretrained(places["ENCODER"])
    monkeypatch.chdir(base)  # in which a file has the form of a Hub id
    places["OLD"] = tmp_path / "old"
    places["OLD"].mkdir()
    (tmp_path / "old" / "config.json").write_text('{"model_type": "mos", "text_config": {"model_type": "llama"}}')
    printed = run(*(places.get(word, word) for word in line.split()))
    assert printed.code == code
    assert message in " ".join(printed.err.replace("│", " ").split())
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_debug_shows_where(run: Callable[..., Printed], base: Path) -> None:
    with pytest.raises(ValueError, match="which is neither"):
        run("--debug", "convert", "./none", "out")


def test_an_extra_that_is_missing_is_named(run: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    error = ModuleNotFoundError("No module named 'fastapi'", name="fastapi.responses")
    assert cli.message_of(error) == "expected fastapi, which is not installed: install hf_mos with its extra 'serve'"


def test_without_typer_the_extra_is_named(tmp_path: Path) -> None:
    code = """
sys.modules["typer"] = None
try:
    import hf_mos.tools.cli
except SystemExit as error:
    print(error)
"""
    assert "install hf_mos with its extra 'cli'" in run_python(code, cache=tmp_path, without_hf_mos=False)


def test_help_and_refusals_need_no_torch(base: Path, tmp_path: Path) -> None:
    lines = [
        ["--help"],
        ["convert", "--help"],
        ["convert"],
        ["convert", "./none", "out"],
        ["evaluate", base],
        ["evaluate", base, "--validation-file", "none.txt"],
        ["inspect", "./none", "--text", "x"],
        ["card", base],
        ["push", "./none", "user/name"],
    ]
    code = """
import json
from hf_mos.tools import cli
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line
    try:
        cli.run()
    except SystemExit as error:
        assert error.code == (0 if "--help" in line else 2), (line, error)
    assert "torch" not in sys.modules, line
print("done")
"""
    given = json.dumps([[*map(str, line)] for line in lines])
    assert "done" in run_python(code, given, cache=tmp_path, without_hf_mos=False, shares_imports=False)


@pytest.mark.parametrize("module", ["typer", "rich.table", "torch", "transformers"])
def test_an_interrupt_while_importing_prints_no_traceback(module: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    (tmp_path / "text.txt").write_text("a")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "hf_mos.tools.cli", "evaluate", str(base), "--validation-file", "text.txt"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": paths}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert process.returncode == 130, process.stderr
    assert "Traceback" not in process.stderr


def test_json_is_all_that_is_on_the_standard_output(
    run: Callable[..., Printed], base: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(*arguments: Any) -> str:
        print("a library has something to say")
        return "cpu"

    monkeypatch.setattr(loading, "choose_device", chatty)
    printed = run("evaluate", base, "--validation-file", text_file, "--json")
    assert json.loads(printed.out)["machine"] == "CPU"
    assert "a library has something to say" in printed.err


# ------------------------------------------------------------------------------------------------------------- convert


def test_convert_is_exact_and_loads_without_hf_mos(run: Callable[..., Printed], base: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3, bos_token_id=0)
    model.save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(source)
    printed = run("convert", source, out, "--num-mixtures", 5, "--json")
    assert printed.code == 0, printed.err
    conversion = json.loads(printed.out)
    assert conversion["num_mixtures"] == 5
    assert conversion["gap"] < 1e-5
    assert conversion["is_exact"]
    assert conversion["num_new_parameters"] == 5 * 32 * 32 + 5 * 32
    assert AutoTokenizer.from_pretrained(out)("Sentence 3").input_ids == tokenizer("Sentence 3").input_ids
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(out).top_k == 3
    code = """
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print(float((model(torch.arange(9)[None]).logits - torch.load(sys.argv[2])).abs().max()))
"""
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        torch.save(model(tokens).logits.log_softmax(-1), tmp_path / "log_probs.pt")
    assert float(run_python(code, out, tmp_path / "log_probs.pt", cache=tmp_path)) < 1e-5


@pytest.mark.parametrize("name", BACKBONES)
def test_convert_of_each_kind(
    run: Callable[..., Printed], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    tiny_causal_lm(name).save_pretrained(tmp_path / "base")
    printed = run("convert", tmp_path / "base", tmp_path / "out", "--max-shard-size", "20KB")
    assert printed.code == 0, printed.err
    assert "none found" in printed.out  # these have no tokenizer
    assert "no tokenizer is saved" in caplog.text
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    tokens = torch.arange(3, 60)[None]
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert log_prob_gap(out, tiny_causal_lm(name), input_ids=tokens) < 1e-4


def test_convert_to_bfloat16(run: Callable[..., Printed], base: Path, tmp_path: Path) -> None:
    printed = run("convert", base, tmp_path / "out", "--dtype", "bfloat16", "--no-tie-word-embeddings", "--json")
    assert printed.code == 0, printed.err
    assert json.loads(printed.out)["dtype"] == "bfloat16"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert weights["lm_head.prior.weight"].dtype == torch.float32


def test_convert_fails_where_the_head_is_not_exact(
    run: Callable[..., Printed], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = MoSForCausalLM.from_causal_lm

    def wrong(*arguments: Any, **options: Any) -> MoSForCausalLM:
        model = convert(*arguments, **options)
        part_components(model)
        return model

    monkeypatch.setattr(MoSForCausalLM, "from_causal_lm", wrong)
    printed = run("convert", base, tmp_path / "out")
    assert printed.code == 1
    assert "expected a gap of at most" in printed.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [[], ["--shortlist-size", "all"]], ids=str)
def test_convert_of_a_model_with_weights_as_trained_ones(
    run: Callable[..., Printed], tmp_path: Path, dtype: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are large, and so is their rounding; a head that is off by little is caught all the same."""
    wide = tiny_causal_lm(hidden_size=576, num_attention_heads=8, head_dim=72)
    with torch.no_grad():
        wide.lm_head.weight.mul_(40)
    wide.to(getattr(torch, dtype)).save_pretrained(tmp_path / "wide")
    printed = run("convert", tmp_path / "wide", tmp_path / "out", *options, "--json")
    assert printed.code == 0, printed.err
    assert json.loads(printed.out)["gap"] < 1e-9
    convert = MoSForCausalLM.from_causal_lm

    def wrong(*arguments: Any, **options: Any) -> MoSForCausalLM:
        model = convert(*arguments, **options)
        with torch.no_grad():
            model.lm_head.shift.weight.fill_(1e-5)
        return model

    monkeypatch.setattr(MoSForCausalLM, "from_causal_lm", wrong)
    printed = run("convert", tmp_path / "wide", tmp_path / "spoilt", *options)
    assert printed.code == 1
    assert "expected a gap of at most 1e-06" in printed.err


def test_force_replaces_the_checkpoint_and_nothing_else(
    run: Callable[..., Printed], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused = run("convert", base, out)
    assert refused.code == 2
    assert "something else than a checkpoint" in refused.err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert run("convert", base, out, "--force").code == 0
    assert (out / "notes.txt").read_text() == "mine"


FORMER = ["README.md", "chat_template.jinja", "eval_results.json", "training_args.bin", "adapter_config.json"]


@pytest.mark.parametrize("command", ["convert", "export"])
def test_force_leaves_no_file_of_the_former_model(
    run: Callable[..., Printed], base: Path, mixture: Path, command: str, tmp_path: Path
) -> None:
    """Its card would be pushed with the new model, and its chat template be used."""
    out = tmp_path / "out"
    shutil.copytree(mixture, out)
    for name in FORMER:
        (out / name).write_text("{}")
    printed = run(command, base if command == "convert" else mixture, out, "--force", "--max-shard-size", "20KB")
    assert printed.code == 0, printed.err
    names = {path.name for path in out.iterdir()}
    assert not [name for name in names & {*FORMER} if (out / name).read_text() == "{}"]
    assert "model.safetensors" not in names
    assert ("modeling_mos.py" in names) == (command == "convert")
    assert run(command, base if command == "convert" else mixture, out, "--force").code == 0
    assert not [*out.glob("model-*.safetensors")]


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_forced_save_that_fails_leaves_the_former_model(
    run: Callable[..., Printed],
    base: Path,
    mixture: Path,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(mixture, out)
    (out / "chat_template.jinja").write_text("{{ messages }}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert run(command, base if command == "convert" else mixture, out, "--force").code == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


OWN_CODE = {
    "configuration_my.py": "from transformers import LlamaConfig\n"
    "class MyConfig(LlamaConfig):\n    model_type = 'my'\n",
    "modeling_my.py": "from transformers import LlamaForCausalLM\n"
    "from .configuration_my import MyConfig\nclass MyForCausalLM(LlamaForCausalLM):\n    config_class = MyConfig\n",
}


@pytest.mark.parametrize("model_type", ["my", "llama"])
def test_a_model_of_its_own_code_is_refused_before_it_is_saved(
    run: Callable[..., Printed], base: Path, text_file: Path, model_type: str, tmp_path: Path
) -> None:
    """A mixture is saved without that code, and nothing could load it."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(base, source)
    for name, code in OWN_CODE.items():
        if model_type == "llama":
            code = code.replace("'my'", "'llama'").replace("from .configuration_my import", "from transformers import")
            code = code.replace("import MyConfig", "import LlamaConfig as MyConfig")
        (source / name).write_text(code)
    config = json.loads((source / "config.json").read_text()) | {"model_type": model_type}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_my.MyForCausalLM"}
    if model_type == "my":
        config["auto_map"]["AutoConfig"] = "configuration_my.MyConfig"
    (source / "config.json").write_text(json.dumps(config))
    data = ["--train-file", text_file, "--max-steps", 1, "--use-cpu", "--block-size", 32]
    for words in (["convert", source, out], ["train", "--model", source, *data, "--output-dir", out]):
        printed = run(*words, "--trust-remote-code")
        assert printed.code == (2 if model_type == "my" else 1)
        assert "model: expected a causal LM of transformers, given" in printed.err
        assert not [*out.glob("*.safetensors")]


# -------------------------------------------------------------------------------------------------------------- export


def test_export_of_a_conversion_is_the_model_that_was_converted(
    run: Callable[..., Printed], base: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3, bos_token_id=0)
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(base).save_pretrained(source)
    assert run("convert", source, tmp_path / "mixture").code == 0
    printed = run("export", tmp_path / "mixture", out, "--json")
    assert printed.code == 0, printed.err
    exported = json.loads(printed.out)
    assert exported["is_same"]
    assert exported["is_written"]
    assert exported["model_class"] == "LlamaForCausalLM"
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((source / name).read_text()), name
    ours, theirs = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_export_of_a_trained_mixture_says_that_something_is_lost(
    run: Callable[..., Printed], mixture: Path, tmp_path: Path
) -> None:
    printed = run("export", mixture, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "20KB")
    assert printed.code == 0, printed.err  # in bf16 rounding alone could be as large as the change
    assert "what the shifts and the prior have learnt" in printed.out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert loaded.dtype == torch.bfloat16
    softmax = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.bfloat16).to_softmax()
    assert log_prob_gap(loaded, softmax, input_ids=torch.arange(3, 60)[None]) == 0


@pytest.mark.parametrize("options", [{}, {"shortlist_size": None}], ids=str)
def test_export_of_a_mixture_that_diverged_says_that_something_is_lost(
    run: Callable[..., Printed], base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Its log-probabilities are NaN, which is larger than no number, and which JSON has no number for."""
    model = MoSForCausalLM.from_causal_lm(base, **options)
    with torch.no_grad():
        model.lm_head.shift.weight.fill_(1e38)
    model.save_pretrained(tmp_path / "mixture")
    printed = run("export", tmp_path / "mixture", tmp_path / "out", "--json")
    exported = json.loads(printed.out, parse_constant=pytest.fail)
    assert not exported["is_same"]
    assert exported["gap"] is None
    assert exported["change"] is None


# ------------------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_is_the_sum_over_one_window(run: Callable[..., Printed], mixture: Path, tmp_path: Path) -> None:
    text = "Sentence 3 says that 3 times 3 is 9."
    file = tmp_path / "short.txt"
    file.write_text(text)
    printed = run("evaluate", mixture, "--validation-file", file, "--json")
    assert printed.code == 0, printed.err
    result = json.loads(printed.out)
    tokens = torch.tensor([[0, *AutoTokenizer.from_pretrained(mixture)(text).input_ids]])
    model = AutoModelForCausalLM.from_pretrained(mixture)
    with torch.no_grad():
        nats = F.nll_loss(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum").item()
    assert result["num_tokens"] == tokens.shape[1] - 1
    assert result["num_bytes"] == len(text)
    assert result["nats_per_token"] == pytest.approx(nats / result["num_tokens"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / result["num_tokens"]), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert result["command"].startswith("hf-mos evaluate")


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 1), (16, 5), (1, 1), (33, 32), (128, 64)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_token_is_counted_once_with_its_context(mixture: Path, window: int, stride: int, batch_size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixture).eval()
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    texts = ["Sentence 3 says that 3 times 3 is 9, and 3 plus one is 4. " * 2, "Sentence 7", "Sentence 1 says"]
    result = evaluate(model, tokenizer, texts, window=window, stride=stride, batch_size=batch_size)
    nats, count = 0.0, 0
    for text in texts:
        tokens = [0, *tokenizer(text).input_ids]
        for target in range(1, len(tokens)):
            # The first window counts all of its tokens, each later one its last `stride`.
            over = max(target - window, 0)
            end = min(window + math.ceil(over / stride) * stride, len(tokens) - 1)
            inputs = torch.tensor([tokens[max(end - window, 0) : target]])
            with torch.no_grad():
                nats -= model(inputs).logits[0, -1, tokens[target]].item()
            count += 1
    assert result.num_tokens == count
    assert result.num_texts == 3
    assert result.nats == pytest.approx(nats, rel=1e-5)


def test_the_mixture_counts_as_the_softmax_that_it_was(
    run: Callable[..., Printed], base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Sentence 3 says that 3 times 3 is 9. " * 20)
    run("convert", base, tmp_path / "out")
    options = ["--validation-file", file, "--window", 64, "--batch-size", 2, "--json"]
    nats = [json.loads(run("evaluate", model, *options).out)["nats"] for model in (base, tmp_path / "out")]
    assert nats[0] == pytest.approx(nats[1], rel=1e-6)


def test_bytes_are_those_of_the_text_as_it_is(run: Callable[..., Printed], mixture: Path, tmp_path: Path) -> None:
    """Not of what a tokenizer makes of it, nor of Python's line ends."""
    text = "ÄÖÜ: naïve\r\nSentence\r\n  日本\n"
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    printed = run("evaluate", mixture, "--validation-file", file, "--json")
    assert json.loads(printed.out)["num_bytes"] == len(text.encode()) == file.stat().st_size

    words = Tokenizer(models.WordLevel({"<s>": 0, "naive": 1, "aou": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="[UNK]")
    result = evaluate(tiny_mos(), tokenizer, ["ÄÖÜ  naïve"])
    assert result.num_tokens == 2
    assert result.num_bytes == len("ÄÖÜ  naïve".encode())


def test_rows_are_texts_of_their_own_unless_joined(run: Callable[..., Printed], mixture: Path, tmp_path: Path) -> None:
    rows = ["Sentence 3 says", "", " that 3"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"passage": row}) for row in rows))
    options = ["--validation-file", file, "--text-column", "passage", "--json"]
    apart = json.loads(run("evaluate", mixture, *options).out)
    joined = json.loads(run("evaluate", mixture, *options, "--join-rows").out)
    (tmp_path / "joined.txt").write_text("".join(rows))
    assert (apart["num_texts"], joined["num_texts"]) == (2, 1)
    whole = json.loads(run("evaluate", mixture, "--validation-file", tmp_path / "joined.txt", "--json").out)
    assert joined["nats"] == whole["nats"]
    assert joined["nats"] != apart["nats"]
    folder = tmp_path / "data"
    folder.mkdir()
    file.rename(folder / "test.jsonl")
    dataset = json.loads(run("evaluate", mixture, "--dataset-name", folder, *options[2:]).out)
    assert dataset["nats"] == apart["nats"]


def test_a_tokenizer_without_ends_needs_a_prefix(run: Callable[..., Printed], mixture: Path, tmp_path: Path) -> None:
    file, bare = tmp_path / "text.txt", tmp_path / "bare"
    file.write_text("Sentence 3 says that 3 times 3 is 9.")
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(bare)
    options = [mixture, "--validation-file", file, "--json"]
    assert "--prefix-token-id" in run("evaluate", *options, "--tokenizer", bare).err
    given = json.loads(run("evaluate", *options, "--tokenizer", bare, "--prefix-token-id", 0).out)
    expected = json.loads(run("evaluate", *options).out)
    assert (given["nats"], given["prefix_token_id"]) == (expected["nats"], 0)


def test_joined_lines_keep_their_ends(run: Callable[..., Printed], mixture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.txt").write_text("Sentence 3 says\n\n  that 3\nSentence 4")
    whole = json.loads(run("evaluate", mixture, "--validation-file", folder / "test.txt", "--json").out)
    joined = json.loads(run("evaluate", mixture, "--dataset-name", folder, "--join-rows", "--json").out)
    assert (joined["num_bytes"], joined["nats"]) == (whole["num_bytes"], whole["nats"])


@pytest.mark.parametrize("suffix", [".JSONL", ".Json", ".CSV"])
def test_a_suffix_may_be_in_upper_case(
    run: Callable[..., Printed], mixture: Path, tmp_path: Path, suffix: str
) -> None:
    row = "text\nSentence 3 says\n" if suffix == ".CSV" else '{"text": "Sentence 3 says"}\n'
    file = tmp_path / f"rows{suffix}"
    file.write_text(row)
    printed = run("evaluate", mixture, "--validation-file", file, "--json")
    assert json.loads(printed.out)["num_bytes"] == len("Sentence 3 says")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_of_csv_is_as_it_is_written(tmp_path: Path, streaming: bool) -> None:
    """Whatever the column next to it holds, and with no value that means null, or a number."""
    texts = ["NA", "null", "None", "", "nan", "012", "1e3", "true", "A, b"]
    numbers = ["1", "", "x", "NA", "2.5", "", "", "", ""]
    file = tmp_path / "rows.csv"
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([("id", "text"), *zip(numbers, texts, strict=True)])
    assert [row["text"] for row in load_rows(file, streaming)] == texts
    assert read_texts(file) == texts
    file.write_bytes(b"text\n\xff\n" if streaming else b"\n\n")
    with pytest.raises(ValueError, match=r"file: expected rows of \.csv, given"):
        next(iter(load_rows(file)))


@pytest.mark.parametrize(
    ("name", "content", "given"),
    [
        ("some.jsonl", '{"text": "Sentence"}\n{"text": null}\n', "null in row 1"),
        ("all.jsonl", '{"text": null}\n{"text": null}\n', "null in row 0"),
        ("numbers.jsonl", '{"text": 1}\n', "a value of type int in row 0"),
        ("lists.jsonl", '{"text": ["Sentence"]}\n{"text": []}\n', "a value of type list in row 0"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_row_that_is_no_text_is_named(
    run: Callable[..., Printed],
    base: Path,
    tmp_path: Path,
    command: str,
    name: str,
    content: str,
    given: str,
) -> None:
    file = tmp_path / name
    file.write_text(content)
    words = [base, "--validation-file", file]
    if command != "evaluate":
        words = ["--model", base, "--train-file", file, "--validation-share", 0, "--output-dir", tmp_path / "out"]
        words += ["--max-steps", 1, "--use-cpu", "--report-to", "none"]
    printed = run(command, *words)
    assert printed.code == 1
    assert f"text_column: expected text or messages in column 'text', given {given}" in printed.err


@pytest.mark.parametrize("command", ["evaluate", "train", "validate"])
@pytest.mark.parametrize("row", [[], [{"role": "system", "content": "a"}]], ids=str)
def test_messages_that_the_template_refuses_are_named(
    run: Callable[..., Printed], base: Path, text_file: Path, tmp_path: Path, command: str, row: Any
) -> None:
    folder, file, out = tmp_path / "base", tmp_path / "chats.jsonl", tmp_path / "out"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    rows = [[{"role": "user", "content": "Sentence 3 says"}], row]
    file.write_text("\n".join(json.dumps({"messages": each}) for each in rows))
    words = {
        "evaluate": ["evaluate", folder, "--validation-file", file],
        "train": ["train", "--model", folder, "--train-file", file, "--validation-share", 0],
        "validate": ["train", "--model", folder, "--train-file", text_file, "--validation-file", file],
    }[command]
    printed = run(*words, *([] if command == "evaluate" else [*QUICK, "--block-size", 8, "--output-dir", out]))
    assert printed.code == 1
    assert re.search(r"error: row 1 of \S*chats\.jsonl: (Cannot apply|No system)", printed.err)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(max_position_embeddings=32),
        MptConfig(max_seq_len=32),
        WhisperConfig(max_target_positions=32),
        GPT2Config(n_positions=32),
        PreTrainedConfig(n_positions=32),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_window_is_that_of_the_model(config: PreTrainedConfig) -> None:
    assert choose_window(config, None, None) == (32, 16)
    with pytest.raises(ValueError, match="at most the model's 32 positions, given 33"):
        choose_window(config, 33, None)
    assert choose_window(PreTrainedConfig(), None, None) == (2048, 1024)


@pytest.mark.parametrize(
    "model_type",
    sorted({*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} & {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}),
)
def test_a_model_has_as_many_positions_as_it_reads(model_type: str) -> None:
    """RoBERTa and its kin count the positions from after the one of their padding token."""
    config = tiny_config(model_type)
    config.pad_token_id = 3
    model, positions = AutoModelForCausalLM.from_config(config).eval(), positions_of(config)
    assert positions is not None
    assert model(input_ids=torch.full((1, positions), 7)).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(input_ids=torch.full((1, positions + 1), 7))


def test_a_mixture_is_evaluated_without_a_tensor_of_the_vocabulary(mixture: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    model = tiny_mos()
    model.resize_token_embeddings(200_000, mean_resizing=False)
    with LargestTensor() as largest:
        result = evaluate(model, tokenizer, ["Sentence 3 says that 3 times 3 is 9. " * 8], window=64)
    assert result.num_tokens > 64
    # The decoder in fp32 is the largest, or a chunk of rows of the loss; never (tokens, V).
    assert largest.numel < 64 * 200_000


def test_a_loss_that_is_not_finite_is_an_error(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="expected a finite loss"):
        evaluate(model, AutoTokenizer.from_pretrained(base), ["Sentence"])


def test_a_model_that_diverged_is_measured(
    run: Callable[..., Printed], mixture: Path, text_file: Path, tmp_path: Path
) -> None:
    """Its perplexity is more than a float holds."""
    folder, page = tmp_path / "diverged", tmp_path / "page.html"
    model = AutoModelForCausalLM.from_pretrained(mixture)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(mixture).save_pretrained(folder)
    printed = run("evaluate", folder, "--validation-file", text_file, "--json")
    assert printed.code == 0, printed.err
    result = json.loads(printed.out, parse_constant=pytest.fail)  # no number is NaN or Infinity
    assert result["nats_per_token"] > 1000
    assert result["perplexity"] is None
    (tmp_path / "results.json").write_text(printed.out)
    assert run("card", folder, "--results", tmp_path / "results.json").code == 0
    card = ModelCard.load(folder / "README.md")
    assert [entry.metric_type for entry in card.data.eval_results] == ["bits_per_byte"]
    assert eval_results(result | {"perplexity": math.inf}) == eval_results(result)

    options = ["--validation-file", text_file, "--max-tokens", 50, "--rank-contexts", 0]
    for command in (["evaluate", *options[:2]], ["inspect", *options]):
        printed = run(command[0], folder, *command[1:])
        assert printed.code == 0, printed.err
        assert re.search(r"perplexity\W+inf\b", printed.out)
    printed = run("inspect", folder, *options, "--html", page)
    assert printed.code == 0, printed.err
    assert re.search(r"perplexity\s+inf\b", re.sub("<[^>]+>", " ", page.read_text(encoding="utf-8")))


def test_a_tokenizer_of_another_model_is_named(base: Path) -> None:
    with pytest.raises(ValueError, match="expected tokens below the model's 97"):
        evaluate(tiny_mos(), AutoTokenizer.from_pretrained(base), ["Sentence 3 says that"])


def test_training_mode_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="expected one in evaluation mode"):
        evaluate(tiny_mos().train(), AutoTokenizer.from_pretrained(base), ["Sentence"])


# ---------------------------------------------------------------------------------------------------------------- card


def test_measurements_go_into_the_card(
    run: Callable[..., Printed], mixture: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(mixture).save_pretrained(folder)
    AutoTokenizer.from_pretrained(mixture).save_pretrained(folder)
    measured = run("evaluate", folder, "--validation-file", text_file, "--stride", 32, "--json")
    (tmp_path / "results.json").write_text(measured.out)
    (folder / "emissions.csv").write_text("emissions,gpu_model,country_name\n0.5,,\n0.0123,H100,Iceland\n")
    about = ["--base-model", "someone/llama", "--license", "mit", "--language", "en", "--limit", "It has read little."]
    measures = ["--results", tmp_path / "results.json", "--model-id", "user/name"]
    printed = run("card", folder, *about, *measures)
    assert printed.code == 0, printed.err

    card = ModelCard.load(folder / "README.md")
    result = json.loads(measured.out)
    found = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
    assert found == {
        "perplexity": round(result["perplexity"], 3),
        "bits_per_byte": round(result["bits_per_byte"], 4),
    }
    assert card.data.co2_eq_emissions == {
        "emissions": 12.3,
        "source": "codecarbon",
        "geographical_location": "Iceland",
        "hardware_used": "H100",
    }
    assert "Training emitted 12.3 g of CO2 equivalents on H100" in card.text
    assert f"Measured by `{result['command']}` on CPU." in card.text
    assert "mixture of 3 softmaxes" in card.text
    assert f"{AutoModelForCausalLM.from_pretrained(mixture).num_parameters():,}" in card.text
    assert "- It has read little." in card.text
    assert (card.data.base_model, card.data.license, card.data.language) == ("someone/llama", "mit", ["en"])

    again = run("card", folder)
    assert again.code == 2
    assert "or --force" in again.err
    assert run("card", folder, "--force").code == 0
    assert "None measured." in ModelCard.load(folder / "README.md").text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"perplexity": "1.5"}, "given perplexity of type str"),
        ({"window": "64"}, "given window of type str"),
        ({"machine": None}, "given machine of type NoneType"),
        ({"model": "user/other"}, "expected results of mixture or name, given those of 'user/other'"),
    ],
    ids=str,
)
def test_results_of_another_model_or_form_are_refused(
    run: Callable[..., Printed], mixture: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    folder, file = tmp_path / "mixture", tmp_path / "results.json"
    shutil.copytree(mixture, folder)
    results = {
        "data": "book",
        "split": None,
        "window": 64,
        "stride": 32,
        "command": "hf-mos evaluate",
        "machine": "CPU",
    }
    results |= {"perplexity": 1.5, "bits_per_byte": None, "model": "elsewhere/mixture"}
    for each, code in ((results | changed, 1), (results, 0)):
        file.write_text(json.dumps(each))
        printed = run("card", folder, "--results", file, "--model-id", "user/name")
        assert printed.code == code, printed.err
        assert (folder / "README.md").exists() == (code == 0)
        assert (message in printed.err) == (code == 1)


def test_a_folder_in_the_place_of_the_card_is_refused_before_any_work(
    run: Callable[..., Printed], base: Path, mixture: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixture"
    shutil.copytree(mixture, folder)
    (folder / "README.md").mkdir()
    for words in (["card", folder], ["train", "--model", base, "--train-file", text_file, "--output-dir", folder]):
        printed = run(*words, "--force")
        assert printed.code == 2
        assert "README.md: expected a file or none, given a folder" in printed.err


def test_a_full_disk_leaves_the_former_card(
    run: Callable[..., Printed], mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(mixture, folder)
    (folder / "README.md").write_text("The card of an hour's work.")
    kept = {path.name for path in folder.iterdir()}

    def fill(card: ModelCard, path: str | Path) -> None:
        Path(path).write_text(str(card)[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", fill)
    printed = run("card", folder, "--force")
    assert printed.code == 1
    assert "No space left on device" in printed.err
    assert (folder / "README.md").read_text() == "The card of an hour's work."
    assert {path.name for path in folder.iterdir()} == kept


# --------------------------------------------------------------------------------------------------------------- train


@pytest.fixture
def wide(tmp_path: Path, base: Path) -> Path:
    """A Llama of D = 576 with large logits, and a tokenizer, in a folder."""
    folder = tmp_path / "wide"
    model = tiny_causal_lm(hidden_size=576, num_attention_heads=8, head_dim=72, vocab_size=300)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


QUICK = ["--use-cpu", "--report-to", "none", "--disable-tqdm", "true", "--logging-steps", 1]


def test_train_and_evaluate_agree(
    run: Callable[..., Printed], wide: Path, base: Path, text_file: Path, tmp_path: Path
) -> None:
    """The perplexity of a run, at step 0 and at the end, is what the command `evaluate` prints of the same file."""
    file = tmp_path / "eval.txt"
    file.write_text("Sentence 3 says that 3 times 3 is 9, and 3 plus one is 4. " * 9)
    out = tmp_path / "out"
    options = ["--train-file", text_file, "--validation-file", file, "--block-size", 64, "--learning-rate", 1e-3]
    options += ["--max-steps", 3, "--eval-on-start", "--per-device-eval-batch-size", 3, "--output-dir", out]
    run_command("train", "--model", wide, *options, *QUICK, cache=tmp_path)
    metrics = json.loads((out / "all_results.json").read_text())
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    first, last = (entry for entry in logs if "eval_loss" in entry)
    evaluation = ["--validation-file", file, "--window", 64, "--stride", 32, "--json"]
    before, after = (json.loads(run("evaluate", model, *evaluation).out) for model in (wide, out))
    assert first["step"] == 0
    assert before["nats_per_token"] > 1.05 * after["nats_per_token"]
    for logged, evaluated in ((first, before), (last, after)):
        assert logged["eval_loss"] == pytest.approx(evaluated["nats_per_token"], rel=1e-5)
        assert logged["eval_perplexity"] == pytest.approx(evaluated["perplexity"], rel=1e-4)
    assert metrics["perplexity"] == last["eval_perplexity"]
    assert (metrics["eval_window"], metrics["eval_stride"]) == (64, 32)

    card = ModelCard.load(out / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {result.dataset_name for result in results.values()} == {"eval.txt"}
    assert {result.dataset_type for result in results.values()} == {"eval.txt"}
    assert {result.dataset_split for result in results.values()} == {None}
    assert results["perplexity"].metric_value == pytest.approx(after["perplexity"], rel=1e-4)
    assert results["perplexity"].metric_name == "perplexity per token, window 64, stride 32"
    assert results["bits_per_byte"].metric_value == pytest.approx(after["bits_per_byte"], abs=1e-3)
    assert f"| {file.name} |" in card.text
    command = next(line for line in card.text.splitlines() if line.startswith("Measured by"))
    assert text_file.name not in card.text.replace(command, "")
    assert "split" not in card.text
    assert str(tmp_path) not in card.text
    assert f"--train-file {text_file.name} --validation-file eval.txt" in command


def test_a_softmax_is_measured_by_the_same_rule(
    run: Callable[..., Printed], wide: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--train-file", text_file, "--validation-file", text_file, "--block-size", 64, "--max-steps", 1]
    assert run("train", "--model", wide, "--head", "softmax", *options, *QUICK, "--output-dir", out).code == 0
    metrics = json.loads((out / "all_results.json").read_text())
    evaluated = run("evaluate", out, "--validation-file", text_file, "--window", 64, "--stride", 32, "--json")
    assert metrics["eval_loss"] == pytest.approx(json.loads(evaluated.out)["nats_per_token"], rel=1e-5)


def test_train_keeps_what_a_folder_holds(
    run: Callable[..., Printed], base: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    options = ["--model", base, "--train-file", text_file, "--block-size", 32, *QUICK, "--output-dir", out]
    run("train", *options, "--max-steps", 4, "--save-steps", 2)
    (out / "README.md").write_text("An edited card.")
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused = run("train", *options, "--max-steps", 1)
    assert refused.code == 2
    assert "or --force, given" in refused.err
    assert "README.md" in refused.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files

    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut short")
    (out / "config.json").unlink()
    resumed = run("train", *options, "--max-steps", 4, "--resume-from-checkpoint", "last")
    assert resumed.code == 0, resumed.err
    assert f"resuming from {out}/checkpoint-2" in resumed.err
    assert "checkpoint-4 is skipped: optimizer.pt is cut short" in caplog.text
    assert run("train", *options, "--max-steps", 1, "--force").code == 0
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]  # none of the other run
    assert "An edited card." not in (out / "README.md").read_text()


@pytest.mark.parametrize("saves", [True, False])
def test_an_interrupted_training_says_how_to_go_on(
    run: Callable[..., Printed],
    base: Path,
    text_file: Path,
    tmp_path: Path,
    saves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    options = ["--model", base, "--train-file", text_file, "--block-size", 32, *QUICK, "--output-dir", out]
    options += ["--max-steps", 4, "--save-steps", 2 if saves else 4]
    take_step = StopOnNonFiniteLoss.on_pre_optimizer_step

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt
        take_step(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnNonFiniteLoss, "on_pre_optimizer_step", interrupt)
        printed = run("train", *options)
    assert printed.code == 130
    assert "interrupted at step 3" in printed.err
    if not saves:
        assert "before a checkpoint was saved; --save-steps" in printed.err
        return
    assert f"To go on from {out}/checkpoint-2" in printed.err
    command = next(line for line in printed.err.splitlines() if line.endswith("--resume-from-checkpoint last"))
    words = shlex.split(command)
    assert run(*words[words.index("train") :]).code == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize("part", ["save_model", "evaluate", "create_model_card"])
def test_an_interruption_after_the_last_step_says_how_to_go_on(
    run: Callable[..., Printed],
    base: Path,
    text_file: Path,
    tmp_path: Path,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    options = ["--model", base, "--train-file", text_file, "--block-size", 32, *QUICK, "--output-dir", out]
    whole = getattr(CardTrainer, part)

    def interrupt(self: Any, output_dir: Any = None, **kwargs: Any) -> None:
        if output_dir is None:  # not of a checkpoint
            raise KeyboardInterrupt
        whole(self, output_dir, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CardTrainer, part, interrupt)
        printed = run("train", *options, "--max-steps", 2)
        unsaved = run("train", *options, "--max-steps", 1, "--save-strategy", "no", "--force")
    assert (printed.code, unsaved.code) == (130, 130)
    assert f"To go on from {out}/checkpoint-2" in printed.err
    assert ("after the trained model was saved in" in unsaved.err) == (part != "save_model")
