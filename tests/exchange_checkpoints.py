"""Writes checkpoints with one release of transformers, or checks the checkpoints that another release wrote.

    python tests/exchange_checkpoints.py write FOLDER
    python tests/exchange_checkpoints.py check FOLDER

Two releases may compute an architecture differently. The log-probabilities of the mixture may differ by at most twice
the difference that the causal LM without the mixture has, plus rounding.
"""

import sys
from pathlib import Path

import torch
import transformers
from helpers import BACKBONES, greedy, random_tokens, tiny_causal_lm, tiny_mos
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_mos

ROUNDING = 1e-5


def results(causal_lm: PreTrainedModel, mos: PreTrainedModel) -> dict[str, Tensor]:
    tokens = random_tokens()
    with torch.no_grad():
        log_probs = {
            "causal LM": causal_lm(input_ids=tokens).logits.log_softmax(-1),
            "mixture": mos(input_ids=tokens).logits,
        }
    return log_probs | {"tokens": greedy(mos, tokens)}


def write(name: str, folder: Path) -> None:
    causal_lm, mos = tiny_causal_lm(name), tiny_mos(name)
    causal_lm.save_pretrained(folder / "causal LM" / name)
    mos.save_pretrained(folder / "mixture" / name)
    save_file(results(causal_lm, mos), folder / f"{name}.safetensors")


def check(name: str, folder: Path) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(folder / "causal LM" / name)
    mos = AutoModelForCausalLM.from_pretrained(folder / "mixture" / name)
    assert isinstance(mos, hf_mos.MoSForCausalLM)
    assert isinstance(mos, type(causal_lm))
    ours, theirs = results(causal_lm, mos), load_file(folder / f"{name}.safetensors")
    gaps = {model: float((ours[model] - theirs[model]).abs().max()) for model in ("causal LM", "mixture")}
    print(f"{name}: largest log-probability gap {gaps['mixture']:.1e}, without the mixture {gaps['causal LM']:.1e}")
    assert gaps["mixture"] <= ROUNDING + 2 * gaps["causal LM"]
    assert torch.equal(ours["tokens"], theirs["tokens"])


def main() -> None:
    actions = {"write": write, "check": check}
    if len(sys.argv) != 3 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    for name in BACKBONES:
        actions[sys.argv[1]](name, Path(sys.argv[2]))
    print(f"transformers {transformers.__version__}: {sys.argv[1]}: ok")


if __name__ == "__main__":
    main()
