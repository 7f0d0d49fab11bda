"""Checks `accelerate estimate-memory` on a checkpoint with remote code, in a local folder in place of the Hub."""

import json
from pathlib import Path

import pytest
from helpers import run_python, tiny_mos

# The command asks the Hub what a name is; all that follows is its own. Its table is in powers of 1024.
ESTIMATE = """
import json
from pathlib import Path
from types import SimpleNamespace
from accelerate.commands import estimate
folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
estimate.verify_on_hub = lambda name, token=None: SimpleNamespace(library_name="transformers", config=config)
warnings.simplefilter("default")
arguments = ["estimate-memory", str(folder), "--dtypes", "float32", "--trust_remote_code"]
rows = estimate.gather_data(estimate.estimate_command_parser().parse_args(arguments[1:]))
model = estimate.create_empty_model(str(folder), None, trust_remote_code=True)
print(json.dumps({"rows": rows, "class": type(model).__name__, "device": model.lm_head.prior.weight.device.type}))
"""


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_estimate_memory(name: str, tmp_path: Path) -> None:
    model = tiny_mos(name)
    model.save_pretrained(tmp_path / "model")
    printed = json.loads(run_python(ESTIMATE, tmp_path / "model", cache=tmp_path).splitlines()[-1])
    assert (printed["class"], printed["device"]) == (type(model).__name__, "meta")
    dtype, largest_layer, total, _ = printed["rows"][0]
    assert dtype == "float32"
    size = sum(weight.numel() * 4 for weight in model.parameters())
    if name != "llama":  # a tied weight is counted twice, as in any model
        size += model.lm_head.weight.numel() * 4
    assert total == pytest.approx(size, rel=0.02)  # and a few buffers
    head = sum(weight.numel() * 4 for weight in model.lm_head.parameters())
    assert largest_layer >= head * 0.99  # the head stays in one piece
