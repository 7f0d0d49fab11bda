"""Checks that `import hf_mos` imports neither torch nor transformers, and that all it adds is there all the same."""

from pathlib import Path
from typing import Any

import pytest
from helpers import run_python, tiny_mos

ADDED = """
folder = sys.argv[1]
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(folder)
assert isinstance(config, hf_mos.MoSConfig), type(config)
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model) is hf_mos.MoSLlamaForCausalLM, type(model)
from hf_mos.remote_code import mos_head, mos_loss
assert mos_loss.apply_when_compiling.__module__ == "hf_mos.training.compiled_loss"
assert mos_head.MoSLMHead.shard_of is not None
assert model.read_fused_forward is not None
assert hf_mos.MoSForCausalLM.from_causal_lm.__module__ == "hf_mos.conversion"
assert AutoModelForCausalLM.from_pretrained(folder, config=config).config is not None
model.save_pretrained(sys.argv[2])
"""


def slow(first: str) -> Any:
    return pytest.param(first, marks=pytest.mark.slow)


def test_importing_is_cheap(tmp_path: Path) -> None:
    code = """
import hf_mos
assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
assert {"MoSForCausalLM", "mos_cross_entropy"} <= {*dir(hf_mos)}
assert not hasattr(hf_mos, "other")
print(hf_mos.__version__)
"""
    assert run_python(code, cache=tmp_path, without_hf_mos=False, shares_imports=False)


@pytest.mark.parametrize(
    "first",
    [
        "import hf_mos",
        "from transformers import AutoModelForCausalLM; import hf_mos",
        slow("import transformers, hf_mos; from transformers import LlamaConfig"),
        slow("import hf_mos; hf_mos.MoSConfig"),
        slow("import hf_mos; hf_mos.mos_cross_entropy"),
        slow("import hf_mos.remote_code.modeling_mos"),  # as a pickle does
    ],
)
def test_all_that_is_added_is_there_whatever_comes_first(first: str, tmp_path: Path) -> None:
    tiny_mos().save_pretrained(tmp_path / "saved")
    run_python(
        first + ADDED,
        tmp_path / "saved",
        tmp_path / "again",
        cache=tmp_path,
        without_hf_mos=False,
        shares_imports=False,
    )
    assert '"auto_map"' in (tmp_path / "again" / "config.json").read_text()


def test_the_operator_comes_with_the_loss_alone(tmp_path: Path) -> None:
    code = """
from hf_mos import mos_cross_entropy
import torch
assert "hf_mos.remote_code.modeling_mos" not in sys.modules
print(torch.ops.hf_mos.cross_entropy.default)
"""
    assert "cross_entropy" in run_python(code, cache=tmp_path, without_hf_mos=False, shares_imports=False)
