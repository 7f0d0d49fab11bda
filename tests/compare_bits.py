"""Compares two versions of hf_mos bit by bit: losses, log-probabilities, scores and gradients of saved inputs.

Run it on the old version with a file that does not exist yet, then on the new version with the same file:

    git worktree add ../old OLD_COMMIT
    PYTHONPATH=../old python tests/compare_bits.py bits.pt    # writes the inputs and the results
    PYTHONPATH=. python tests/compare_bits.py bits.pt         # compares; exit code 1 at the first difference

The file holds the inputs, so both versions get the same bits. Run both on one machine.
"""

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_causal_lm
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mos import MoSForCausalLM, mos_cross_entropy, mos_log_probs
from hf_mos.mos_token_scores import SCORES, ScoreOptions

N, K, E, R, V = 37, 3, 24, 8, 211


def subspace_latents(*tensors: Tensor) -> Any:
    """Finds the class where this version has it."""
    for module in ("hf_mos.mixture_of_softmaxes", "hf_mos.mos_latents"):
        try:
            return importlib.import_module(module).SubspaceLatents(*tensors)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise AssertionError("no SubspaceLatents")


def make_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = -100
    models: dict[str, Any] = {}
    for name, rank in itertools.product(("llama", "llama-tied", "gpt2", "gemma2", "mixtral", "mamba"), (None, R)):
        model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(name), num_mixtures=K, latent_rank=rank)
        weights = {key: draw(*weight.shape) / 8 for key, weight in model.lm_head.named_parameters()}
        models[f"{name}, latent_rank={rank}"] = {k: w for k, w in weights.items() if not k.startswith("decoder")}
    return {
        "latents": draw(N, K, E),
        "hidden_states": draw(N, E),
        "shifts": draw(N, K, R),
        "basis": draw(E, R),
        "prior_logits": draw(N, K),
        "decoder_weight": draw(V, E),
        "decoder_bias": draw(V),
        "targets": targets,
        "input_ids": torch.randint(3, 97, (3, 17), generator=generator),
        "models": models,
    }


def functions(inputs: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """`mos_cross_entropy` and `mos_log_probs` with the options that change their path."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    cases = itertools.product(("full", "subspace"), dtypes, (None, 3.0), (False, True), ("mean", "none"), (None, 5))
    for kind, dtype, softcap, has_bias, reduction, chunk_size in cases:
        names = ("latents",) if kind == "full" else ("hidden_states", "shifts", "basis")
        leaves = [inputs[name].to(dtype).requires_grad_() for name in names]
        prior, weight, bias = (
            inputs[name].to(dtype).requires_grad_() for name in ("prior_logits", "decoder_weight", "decoder_bias")
        )
        latents = leaves[0] if kind == "full" else subspace_latents(*leaves)
        options: dict[str, Any] = {"decoder_bias": bias if has_bias else None, "softcap": softcap}
        loss = mos_cross_entropy(
            latents, prior, weight, inputs["targets"], reduction=reduction, chunk_size=chunk_size, **options
        )
        wanted = [*leaves, prior, weight, *([bias] if has_bias else [])]
        gradients = torch.autograd.grad(loss.square().sum(), wanted)
        with torch.no_grad():
            log_probs = mos_log_probs(latents, prior, weight, **options)
        yield (
            f"{kind}, {dtype}, softcap={softcap}, bias={has_bias}, {reduction}, {chunk_size}",
            [
                loss,
                *gradients,
                log_probs,
            ],
        )


def through_models(inputs: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Conversions in training and evaluation, with the decoder read and called."""
    for label, weights in inputs["models"].items():
        name, _, rank = label.partition(", latent_rank=")
        for calls_decoder, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
            options = {"latent_rank": None if rank == "None" else int(rank), "balance_coefficient": 0.01}
            model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(name), num_mixtures=K, **options)
            model.lm_head.load_state_dict(weights, strict=False)
            model = model.to(dtype)
            if calls_decoder:
                model.lm_head.decoder.register_forward_hook(lambda module, arguments, output: None)
            yield f"{label}, called={calls_decoder}, {dtype}", outputs_of(model, inputs["input_ids"])


def outputs_of(model: PreTrainedModel, input_ids: Tensor) -> list[Any]:
    labels = input_ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        evaluated = model(input_ids=input_ids, labels=labels)
        generated = model.generate(input_ids, max_new_tokens=4, do_sample=False)
    model.train()
    trained = model(input_ids=input_ids, labels=labels, use_cache=False)
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    gradients = torch.autograd.grad(trained.loss, list(parameters.values()), allow_unused=True)
    head: Any = model.lm_head
    hidden_states = model.backbone(input_ids=input_ids).logits
    scores = head(hidden_states, targets=input_ids, scores=ScoreOptions(1.3, SCORES))
    (d_scores,) = torch.autograd.grad((scores[0] + scores[1]).sum(), [head.prior.weight])
    return [evaluated.loss, evaluated.logits, generated, trained.loss, *gradients, *scores, d_scores]


def main() -> None:
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    if not file.exists():
        inputs = make_inputs()
        results = [*functions(inputs), *through_models(inputs)]
        torch.save({"inputs": inputs, "results": results}, file)
        print(f"wrote {sum(len(tensors) for _, tensors in results)} tensors of {len(results)} cases to {file}")
        return
    saved = torch.load(file)
    count = 0
    results = itertools.chain(functions(saved["inputs"]), through_models(saved["inputs"]))
    for (label, old), (new_label, new) in zip(saved["results"], results, strict=True):
        assert label == new_label, (label, new_label)
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            same = after is None if before is None else before.dtype == after.dtype and torch.equal(before, after)
            if not same:
                sys.exit(f"{label}: tensor {place} differs")
            count += 1
    print(f"{count} tensors of {len(saved['results'])} cases are equal to the bit")


if __name__ == "__main__":
    main()
