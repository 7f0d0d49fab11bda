"""Checks pushing to a Hub: the checkpoint loads bit for bit without hf_mos, and a failed push leaves nothing."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command, server_with
from fresh_processes import TRANSFORMERS
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mos.tools.push import files_of

TOKEN = "hf_of_the_user"
NAME = "user/name"
PROMPT = "Sentence 3 says that"

LOAD = """
import sys
sys.modules["hf_mos"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

name, sha, text, out = sys.argv[1:]
trusted = {"trust_remote_code": True, "revision": sha, "code_revision": sha}
model = AutoModelForCausalLM.from_pretrained(name, **trusted)
tokenizer = AutoTokenizer.from_pretrained(name, **trusted)
tokens = tokenizer(text, return_tensors="pt").input_ids
assert type(model).__module__.startswith("transformers_modules"), type(model)
with torch.no_grad():
    logits = model(tokens).logits
save_file({"tokens": tokens, "logits": logits, "generated": model.generate(tokens, max_new_tokens=5)}, out)
"""
PUSH_MODEL = """
import sys
from hf_mos import MoSForCausalLM
from transformers import AutoTokenizer

folder, name = sys.argv[1:]
MoSForCausalLM.from_pretrained(folder).push_to_hub(name, private=True)
AutoTokenizer.from_pretrained(folder).push_to_hub(name)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    """One address for all tests, as libraries read it when they are imported."""
    with HubServer(tokens={TOKEN: "user", "hf_of_another": "another"}) as server:
        yield server


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    server.clear()
    return server


def python(code: str, *arguments: Any, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_HOME": str(cache), **variables}
    return server_with(*TRANSFORMERS, **variables).run(code, *arguments, cwd=cache, environment=environment)


def assert_equal_when_loaded(hub: HubServer, folder: Path, sha: str, tmp_path: Path, token: str | None = None) -> None:
    """Bit-equal logits and the same tokens in a fresh process with an empty cache that cannot import hf_mos."""
    cache = tmp_path / "cache-of-the-reader"
    cache.mkdir()
    process = python(LOAD, NAME, sha, PROMPT, tmp_path / "loaded", cache=cache, **hub.environment(token))
    assert process.returncode == 0, process.stderr
    loaded = load_file(tmp_path / "loaded")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(loaded["tokens"], tokens)
    with torch.no_grad():
        assert torch.equal(loaded["logits"], model(tokens).logits)
    assert torch.equal(loaded["generated"], model.generate(tokens, max_new_tokens=5))
    assert "GET storage" in hub.requests


def test_push_and_load(hub: HubServer, mixture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(mixture, folder)
    for name in ("trainer_state.json", "secrets.json", "notes.md", "book.txt", "private.png", "my_script.py"):
        (folder / name).write_text("{}")  # neither of these is the model's
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.json").write_text("{}")
    process = run_command("push", folder, NAME, "--json", cache=tmp_path, **hub.environment(TOKEN))
    pushed = json.loads(process.stdout)

    repo = hub.repos[NAME]
    _, commit, pin = repo.commits
    assert commit.sha == pushed["revision"]
    code = {path.name for path in mixture.glob("*.py")}
    assert {"modeling_mos.py", "mos_head.py"} <= code
    beside = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert set(commit.changed) == {"model.safetensors", "chat_template.jinja", *code, *beside}
    assert pin.changed == ["README.md"]
    assert not repo.is_private

    card = ModelCard(repo.at("main").files["README.md"].content.decode())
    assert f'"revision": "{commit.sha}", "code_revision": "{commit.sha}"' in card.text
    assert f'from_pretrained("{NAME}", **trusted)' in card.text
    assert "where `main` stands" not in card.text
    assert_equal_when_loaded(hub, folder, commit.sha, tmp_path)


LOAD_TOKENIZER = """
import json, sys
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps([tokenizer.name, tokenizer.chat_template]))
"""
OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

from .own_parts import NAME


class OwnTokenizer(PreTrainedTokenizerFast):
    name = NAME
"""


@pytest.mark.parametrize("classes", [[None, "own.OwnTokenizer"], {"AutoTokenizer": ["own.OwnTokenizer", None]}])
def test_a_tokenizer_is_sent_whole(hub: HubServer, mixture: Path, tmp_path: Path, classes: Any) -> None:
    """With its code, the code that this imports, and further chat templates."""
    folder = tmp_path / "folder"
    shutil.copytree(mixture, folder)
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": classes}))
    (folder / "own.py").write_text(OWN_TOKENIZER)
    (folder / "own_parts.py").write_text("NAME = 'own'\n")
    run_command("push", folder, NAME, cache=tmp_path, **hub.environment(TOKEN))
    pushed = hub.repos[NAME].at("main").files
    for name in ("own.py", "own_parts.py", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert pushed[name].content == (folder / name).read_bytes()
    process = python(LOAD_TOKENIZER, NAME, cache=tmp_path, **hub.environment())
    assert json.loads(process.stdout) == ["own", tokenizer.chat_template], process.stderr


def test_the_code_of_another_repository_is_not_sent(mixture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(mixture, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    before = files_of(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["someone/model--own.OwnTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert files_of(folder) == before


def test_a_branch_a_private_repository_and_a_second_push(hub: HubServer, mixture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(mixture, folder)
    variables = hub.environment(TOKEN)
    run_command("push", folder, NAME, "--private", "--revision", "v2", "--no-pin", cache=tmp_path, **variables)
    repo = hub.repos[NAME]
    assert repo.is_private
    assert set(repo.branches) == {"main", "v2"}
    assert set(repo.at("main").files) == {".gitattributes"}
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.prior.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run_command("push", folder, NAME, "--revision", "v2", "--no-pin", cache=tmp_path, **variables)
    last = repo.at("v2")
    assert last.changed == ["model.safetensors"]  # the rest is there
    assert last.files["model.safetensors"].content == (folder / "model.safetensors").read_bytes()

    stranger = python(LOAD, NAME, last.sha, PROMPT, tmp_path / "x", cache=tmp_path, **hub.environment("hf_of_another"))
    assert stranger.returncode == 1
    assert f"{NAME} is not a local folder and is not a valid model identifier" in stranger.stderr
    assert_equal_when_loaded(hub, folder, last.sha, tmp_path, TOKEN)


def test_push_to_hub_of_the_model(hub: HubServer, mixture: Path, tmp_path: Path) -> None:
    process = python(PUSH_MODEL, mixture, NAME, cache=tmp_path, **hub.environment(TOKEN))
    assert process.returncode == 0, process.stderr
    repo = hub.repos[NAME]
    assert repo.is_private
    assert {"model.safetensors", "modeling_mos.py", "config.json"} <= set(repo.commits[1].changed)
    assert_equal_when_loaded(hub, mixture, repo.branches["main"], tmp_path, TOKEN)


def test_push_to_hub_of_the_trainer(hub: HubServer, base: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "name"
    quick = ["--use-cpu", "--report-to", "none", "--disable-tqdm", "true", "--block-size", 32, "--max-steps", 2]
    options = ["--model", base, "--train-file", text_file, "--output-dir", out, "--push-to-hub", *quick]
    options += ["--hub-model-id", NAME, "--bf16-full-eval"]
    run_command("train", *options, cache=tmp_path, **hub.environment(TOKEN))
    repo = hub.repos[NAME]
    *_, commit, pin = repo.commits
    assert {"model.safetensors", "modeling_mos.py", "tokenizer.json", "README.md"} <= set(commit.files)
    assert pin.changed == ["README.md"]
    weights = load(commit.files["model.safetensors"].content)  # as they were trained; the evaluation rounds its own
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    card = ModelCard(pin.files["README.md"].content.decode())
    result, _ = card.data.eval_results
    metrics = json.loads((out / "all_results.json").read_text())
    assert result.metric_value == pytest.approx(metrics["perplexity"], abs=1e-3)
    assert f'"code_revision": "{commit.sha}"' in card.text
    assert "Measured by `python -m hf_mos.tools.cli train --model" in card.text
    assert_equal_when_loaded(hub, out, commit.sha, tmp_path)


@pytest.mark.parametrize(
    ("token", "name", "faults", "message"),
    [
        ("hf_wrong", NAME, {}, "Invalid credentials in Authorization header"),
        (
            "hf_of_another",
            NAME,
            {},
            "You don't have the rights to create or change a model",
        ),
        (TOKEN, NAME, {"/commit/": 503}, "503"),
        (TOKEN, NAME, {"/preupload/": 500}, "500"),
        (TOKEN, NAME, {"storage": 403}, "Error while uploading 'model.safetensors'"),
        (TOKEN, NAME, {"/repos/create": 500}, "500"),
        (TOKEN, "user/name/more", {}, "user/name/more"),
    ],
)
def test_a_push_that_fails_leaves_nothing_half_there(
    hub: HubServer, mixture: Path, tmp_path: Path, token: str, name: str, faults: dict[str, int], message: str
) -> None:
    hub.faults = faults
    folder = tmp_path / "folder"
    shutil.copytree(mixture, folder)
    process = run_command("push", folder, name, cache=tmp_path, code=1, **hub.environment(token))
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())  # the initial one
    hub.faults = {}
    if name == NAME:
        run_command("push", folder, name, cache=tmp_path, **hub.environment(TOKEN))
        assert_equal_when_loaded(hub, folder, hub.repos[NAME].branches["main"], tmp_path)


def test_a_pin_that_fails_is_a_warning(hub: HubServer, mixture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(mixture, folder)
    run_command("push", folder, NAME, "--no-pin", cache=tmp_path, **hub.environment(TOKEN))
    sha = hub.repos[NAME].branches["main"]
    hub.faults = {"/commit/": 503}
    process = run_command("push", folder, NAME, "--json", cache=tmp_path, **hub.environment(TOKEN))
    assert json.loads(process.stdout)["card_revision"] is None
    assert "its card names no revision" in process.stderr
    assert hub.repos[NAME].branches["main"] == sha


@pytest.mark.parametrize(
    ("name", "revision", "token", "message"),
    [
        ("user/none", "main", TOKEN, "user/none is not a local folder and is not a valid model identifier"),
        (NAME, "v9", TOKEN, "v9 is not a valid git identifier"),
        (NAME, "main", "hf_wrong", NAME),
        (NAME, "main", "hf_of_another", f"{NAME} is not a local folder and is not a valid model identifier"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    hub: HubServer, mixture: Path, text_file: Path, tmp_path: Path, name: str, revision: str, token: str, message: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(mixture, folder)
    run_command("push", folder, NAME, "--private", cache=tmp_path, **hub.environment(TOKEN))
    command = ["evaluate", name, "--validation-file", text_file, "--revision", revision]
    (tmp_path / "reader").mkdir()
    process = run_command(*command, cache=tmp_path / "reader", code=1, **hub.environment(token))
    assert message in " ".join(process.stderr.split())
    assert "Traceback" not in process.stderr


def test_commands_take_a_model_of_the_hub(hub: HubServer, mixture: Path, text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(mixture, folder)
    pushed = run_command("push", folder, NAME, "--json", cache=tmp_path, **hub.environment(TOKEN))
    revision = json.loads(pushed.stdout)["revision"]
    losses = [
        json.loads(
            run_command(
                "evaluate", model, "--validation-file", text_file, "--json", *more, cache=tmp_path, **env
            ).stdout
        )
        for model, more, env in ((folder, [], {}), (NAME, ["--revision", revision], hub.environment()))
    ]
    assert losses[0]["nats"] == losses[1]["nats"]


BROKEN = {
    "config.json": "a folder with a checkpoint, given one without config.json",
    "mos_head.py": "the code beside the weights, given none of mos_head.py",
    "modeling_mos.py": "the code beside the weights, given none of modeling_mos.py",
    "model.safetensors": "weights in safetensors, given none",
}


@pytest.mark.parametrize("missing", BROKEN)
def test_a_folder_that_is_not_whole_is_refused_before_anything_is_sent(
    hub: HubServer, mixture: Path, tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(mixture, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / missing).unlink()
    process = run_command("push", folder, NAME, cache=tmp_path, code=2, **hub.environment(TOKEN))
    assert BROKEN[missing] in process.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"", "config.json: expected JSON, given a file that is none"),
        ("config.json", b"\xff{}", "config.json: expected text in UTF-8, given a file that is none"),
        ("config.json", b"[]", "config.json: expected a JSON object, given a list"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: expected JSON, given a file that is none"),
        ("README.md", b"\xff", "README.md: expected text in UTF-8, given a file that is none"),
    ],
)
def test_a_broken_file_is_named_before_anything_is_sent(
    hub: HubServer, mixture: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(mixture, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / name).write_bytes(content)
    process = run_command("push", folder, NAME, cache=tmp_path, code=2, **hub.environment(TOKEN))
    assert message in process.stderr
    assert hub.requests == []


def test_a_softmax_is_not_pushed_as_a_mixture(hub: HubServer, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(base, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    process = run_command("push", folder, NAME, cache=tmp_path, code=2, **hub.environment(TOKEN))
    assert "expected a mixture of softmaxes, given a 'llama'" in process.stderr
    assert hub.requests == []
