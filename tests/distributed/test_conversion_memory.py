"""Checks that converting a sharded checkpoint peaks at the memory of one model."""

import json
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

# The peak of what the process itself holds and of the files that it has mapped, beyond what the imports took, when
# all weights have been used.
CONVERT = r"""
import json, re, sys
from pathlib import Path
import torch
from hf_mos import MoSForCausalLM
torch.set_num_threads(1)
peak_now = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))
before = peak_now()
model = MoSForCausalLM.from_causal_lm(sys.argv[1], num_mixtures=4)
size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
with torch.no_grad():  # weights are read from their files when they are first used
    assert all(tensor.sum().isfinite() for tensor in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
peak = peak_now() - before
print(json.dumps({"peak": peak, "size": size}))
"""


def generate(folder: Path) -> None:
    """A sharded checkpoint of 2 GB, in fp32."""
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=28,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")


def test_the_peak_is_the_model_itself(tmp_path: Path) -> None:
    generate(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 10
    process = subprocess.run([sys.executable, "-c", CONVERT, tmp_path], capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout.splitlines()[-1])
    ratio = measured["peak"] / measured["size"]
    print(f"{measured['size'] / 1e9:.2f} GB, peak {measured['peak'] / 1e9:.2f} GB, {ratio:.3f} times")
    assert 0.9 < ratio <= 1.1
    assert "Loading weights" in process.stderr  # progress
