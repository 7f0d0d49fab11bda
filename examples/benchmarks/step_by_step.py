"""Rounding in bf16: the log-probabilities of sampled text, made step by step with a cache, against those of one pass.

    make quickstart    # trains the mixture, in quickstart-out
    python examples/benchmarks/step_by_step.py quickstart-out quickstart-model/SmolLM2-135M-Instruct

Each model samples its own text from the same prompts. A mixture is measured as it is, and with components that differ
on all classes. On a shortlist rounding can move a class over the boundary of the M likeliest, which changes its
log-probability at once.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_mos  # noqa: F401  # registers the mixtures
from hf_mos.tools.loading import is_mixture

PROMPTS = (
    "The sorted function of Python",
    "He opened the door and",
    "An exception is raised when",
    "The city was founded",
)


@torch.no_grad()
def gaps(model: Any, tokenizer: Any, new_tokens: int, seed: int) -> tuple[float, float]:
    """The largest difference in nats, of any class and of the sampled classes."""
    torch.manual_seed(seed)
    largest = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").input_ids
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=tokenizer.eos_token_id,
        )
        steps = torch.stack(outputs.logits, dim=1).float().log_softmax(-1)[0]
        start = inputs.shape[1]
        one_pass = model(outputs.sequences).logits[0, start - 1 : -1].float().log_softmax(-1)
        gap = (steps - one_pass).abs()
        largest.append((gap.amax(), gap.gather(1, outputs.sequences[0, start:, None]).amax()))
    any_class, sampled = (float(max(values)) for values in zip(*largest, strict=True))
    return any_class, sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of checkpoints")
    parser.add_argument("--new-tokens", type=int, default=32, help="for each of the prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    for folder in arguments.models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        on_all_classes: dict[str, Any] = {"shortlist_size": None}
        variants = {"": {}} | ({", on all classes": on_all_classes} if is_mixture(config) else {})
        for name, options in variants.items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=arguments.dtype, **options).eval()
            any_class, sampled = gaps(model, tokenizer, arguments.new_tokens, arguments.seed)
            print(f"{folder}{name}: {any_class:.3f} nats of any class, {sampled:.3f} of a sampled one", flush=True)


if __name__ == "__main__":
    main()
