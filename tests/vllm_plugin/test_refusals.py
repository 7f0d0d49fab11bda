"""Checks that a checkpoint that is broken, or that cannot be served, is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import random_tokens
from models import CONFIGS as CONFIGS_OF_BACKBONES
from models import make_mixture
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from hf_mos.tools import vllm_plugin

NAMES = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_mixture("llama").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM waits before it reads a config a second time."""
    from vllm.transformers_utils import repo_utils

    monkeypatch.setattr(repo_utils, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for name in NAMES:
        shutil.copyfile(whole / name, tmp_path / name)
    return tmp_path


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)]


TENSORS = {
    "no head": (without("lm_head."), r"given one without lm_head.prior.weight of shape \(3, 64\), lm_head.shift"),
    "no decoder": (without("lm_head.weight"), r"given one without lm_head.weight of shape \(97, 64\)$"),
    "no shift": (without("lm_head.shift"), r"given one without lm_head.shift.weight of shape \(192, 64\)$"),
    "a tensor of another head": (
        lambda tensors: tensors.update({"lm_head.decoder.weight": torch.zeros(97, 64)}),
        "expected the weights that the config names, given lm_head.decoder.weight too",
    ),
    "a bias of nobody": (
        lambda tensors: tensors.update({"lm_head.bias": torch.zeros(97)}),
        "expected the weights that the config names, given lm_head.bias too",
    ),
    "another shape": (
        lambda tensors: tensors.update({"lm_head.shift.weight": torch.zeros(64, 64)}),
        r"lm_head.shift.weight: expected \(192, 64\), as the config says, given \(64, 64\)",
    ),
    "another vocabulary": (
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 64)}),
        r"lm_head.weight: expected \(97, 64\), as the config says, given \(96, 64\)",
    ),
    "a number that is none": (
        lambda tensors: tensors["lm_head.prior.weight"].fill_(float("nan")),
        "lm_head.prior.weight: expected finite values, given nan",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_broken_weights(case: str, broken: Path, engine: Callable[..., Any]) -> None:
    change, message = TENSORS[case]
    change_tensors(broken, change)
    with pytest.raises(ValueError, match=message) as raised, engine(broken):
        pass
    assert str(broken) in str(raised.value)


def test_a_tensor_of_nobody(broken: Path, engine: Callable[..., Any]) -> None:
    """vLLM itself refuses it."""
    change_tensors(broken, lambda tensors: tensors.update({"model.other.weight": torch.zeros(64)}))
    with (
        pytest.raises(ValueError, match="There is no module or parameter named 'other' in LlamaModel"),
        engine(broken),
    ):
        pass


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an architecture that vLLM lacks": (
        {"architectures": ["MoSMoonForCausalLM"]},
        "expected an architecture of vllm 0.32.0, given 'MoonForCausalLM'",
    ),
    "quantized": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "expected a checkpoint that is not qu"),
    "an interrupted save": ({"transformers_weights": "_saving_1/model.safetensors"}, "expected a finished save"),
    "an earlier version": ({"backbone_model_type": None}, "backbone_model_type: expected a model type that transf"),
    "an option out of range": ({"num_mixtures": 0}, "num_mixtures: expected an int of at least 1, given 0"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_are_refused_before_weights_are_read(case: str, broken: Path, engine: Callable[..., Any]) -> None:
    fields, message = CONFIGS[case]
    change_config(broken, **fields)
    if "transformers_weights" not in fields:
        (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message), engine(broken):
        pass


def test_a_file_that_is_cut_short(broken: Path, engine: Callable[..., Any]) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=f"{path}: expected a whole safetensors file"), engine(broken):
        pass


def test_pickled_weights(broken: Path, engine: Callable[..., Any]) -> None:
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected safetensors, given pytorch_model\.bin, pickled"), engine(broken):
        pass


def test_a_model_that_changes_its_logits_again(
    whole: Path, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.llama import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "compute_logits", lambda self, h: 2 * self.logits_processor(self.lm_head, h))
    with pytest.raises(ValueError, match="MoSLlamaForCausalLM: expected a model that returns what its"), engine(whole):
        pass


def test_pipeline_parallelism(known_classes: None) -> None:
    from hf_mos.tools import vllm_model

    config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=2))
    with pytest.raises(ValueError, match="pipeline_parallel_size: expected 1 for a mixture, given 2"):
        vllm_model.MoSLlamaForCausalLM(vllm_config=config)


def test_another_version_of_vllm_serves_all_but_mixtures(
    whole: Path, tmp_path: Path, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm
    from vllm.transformers_utils import config as parsers

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    ours = parsers._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"]
    monkeypatch.setitem(parsers._CONFIG_FORMAT_TO_CONFIG_PARSER, "hf", ours.__mro__[2])  # vLLM's own
    vllm_plugin.register()
    with pytest.raises(ImportError, match=r"vllm: expected 0.32.0 to serve a mixture, given 0.33.1"):
        parsers.get_config(whole, trust_remote_code=False)
    softmax = tmp_path / "softmax"
    CONFIGS_OF_BACKBONES["llama"]().save_pretrained(softmax)
    assert parsers.get_config(softmax, trust_remote_code=False).model_type == "llama"


def test_a_build_without_the_names_that_are_used(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models import config
    from vllm.transformers_utils import config as parsers

    ours = parsers._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"]
    monkeypatch.setitem(parsers._CONFIG_FORMAT_TO_CONFIG_PARSER, "hf", ours.__mro__[2])
    monkeypatch.delattr(config, "MODELS_CONFIG_MAP")
    vllm_plugin.register()
    with pytest.raises(ImportError, match=r"given a build without one: .*MODELS_CONFIG_MAP"):
        parsers.get_config(whole, trust_remote_code=False)


def test_the_plugin_may_be_called_twice(whole: Path, known_classes: None) -> None:
    from vllm.transformers_utils import config as parsers

    before = parsers._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"]
    vllm_plugin.register()
    assert parsers._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] is before
    config = parsers.get_config(whole, trust_remote_code=False)
    assert config.architectures == ["MoSLlamaForCausalLM", "LlamaForCausalLM"]
    assert (type(config), config.model_type) == (LlamaConfig, "llama")
    assert (config.num_mixtures, config.shortlist_size, config.latent_scale) == (3, None, 3.2 / 64)
    assert not hasattr(config, "auto_map")


def test_remote_code_is_not_needed_and_not_run(broken: Path, engine: Callable[..., Any]) -> None:
    """The folder of a checkpoint has the code of the head; vLLM uses the installed one."""
    change_config(broken, auto_map={"AutoConfig": "bomb.Bomb", "AutoModelForCausalLM": "bomb.Bomb"})
    (broken / "bomb.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    with engine(broken) as llm:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": random_tokens(1, 5)[0].tolist()}]
        (output,) = llm.generate(prompts, SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2
