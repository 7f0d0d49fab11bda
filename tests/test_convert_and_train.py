"""Runs examples/quickstart/convert_and_train.py, and loads its checkpoint in a process without hf_mos."""

from pathlib import Path

import pytest
from fresh_processes import PROGRAMS, fork_server
from helpers import run_python
from transformers import AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart" / "convert_and_train.py"
LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model.config.num_mixtures)
"""


@pytest.mark.slow
def test_it_is_short_and_leaves_a_checkpoint_that_loads_without_hf_mos(tmp_path: Path) -> None:
    assert len(SCRIPT.read_text().splitlines()) < 60
    process = fork_server(*PROGRAMS).run(str(SCRIPT), kind="script", cwd=tmp_path, warnings_are_errors=True)
    assert process.returncode == 0, process.stderr
    assert "Return a new" in process.stdout
    folder = tmp_path / "quickstart-model"
    assert len(AutoTokenizer.from_pretrained(folder)) == 2048
    assert run_python(LOAD, folder, cache=tmp_path).split() == ["MoSLlamaForCausalLM", "16"]
