"""Compares two versions of hf_mos bit by bit: losses, log-probabilities, tokens, scores and gradients of saved inputs.

Run it on the old version with a file that does not exist yet, then on the new version with the same file:

    git worktree add ../old OLD_COMMIT
    PYTHONPATH=../old python tests/compare_bits.py bits.pt    # writes the inputs and the results
    PYTHONPATH=. python tests/compare_bits.py bits.pt         # compares; exit code 1 if a tensor differs

The file holds the inputs, so both versions get the same bits. Run both on one machine.

The old version may be one in which the model wrapped its backbone. There the gradients of the prior and the shift lack
the factor `latent_scale`, so they are written with it. A scale that is a power of two rounds nothing, so all gradients
are compared to the bit. Any other scale rounds in another place of the product: there the gradients are compared to a
tolerance, and all else to the bit.
"""

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_causal_lm
from torch import Tensor

import hf_mos
from hf_mos import MoSForCausalLM, mos_cross_entropy, mos_log_probs

# By the folder, as an editable installation finds the new version's modules in the old one's package too.
WRAPS = not (Path(hf_mos.__file__).parent / "remote_code").is_dir()
if WRAPS:
    from hf_mos.mos_latents import Latents, ShortlistLatents
    from hf_mos.mos_log_probs import infer_log_probs
    from hf_mos.mos_token_scores import SCORES, ScoreOptions
else:
    from hf_mos.remote_code.mos_log_probs import infer_log_probs
    from hf_mos.training.token_scores import SCORES, ScoreOptions, score_tokens

N, K, D, M, V = 37, 3, 24, 8, 211
BACKBONES = ("llama", "llama-tied", "gpt2", "gemma2", "mixtral", "mamba")
SCALES = (8.0, None)
Results = dict[str, Tensor | None]


def make_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = -100
    width = 32  # of the tiny models
    heads = {
        name: {"prior.weight": draw(K, width) / 8, "shift.weight": draw(K * width, width) / 64} for name in BACKBONES
    }
    return {
        "latents": draw(N, K, D),
        "mean": draw(N, D),
        "offsets": draw(N, K, D),
        "prior_logits": draw(N, K),
        "decoder_weight": draw(V, D),
        "decoder_bias": draw(V),
        "targets": targets,
        "input_ids": torch.randint(3, 97, (3, 17), generator=generator),
        "heads": heads,
    }


def arguments_of(leaves: dict[str, Tensor], shortlist_size: int | None) -> tuple[Any, dict[str, Any]]:
    """The latents and the options that say what they are, as this version takes them."""
    if shortlist_size is None:
        return (Latents(leaves["latents"]) if WRAPS else leaves["latents"]), {}
    pair = leaves["mean"], leaves["offsets"]
    return (ShortlistLatents(*pair, size=shortlist_size), {}) if WRAPS else (pair, {"shortlist_size": shortlist_size})


def functions(inputs: dict[str, Any]) -> Iterator[tuple[str, Results]]:
    """The loss and the log-probabilities with the options that change their path."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    cases = itertools.product((None, M), dtypes, (None, 3.0), (False, True), ("mean", "none"))
    for shortlist_size, dtype, softcap, has_bias, reduction in cases:
        names = ["latents"] if shortlist_size is None else ["mean", "offsets"]
        names += ["prior_logits", "decoder_weight", *(["decoder_bias"] if has_bias else [])]
        leaves = {name: inputs[name].to(dtype).requires_grad_() for name in names}
        latents, form = arguments_of(leaves, shortlist_size)
        positional = (latents, leaves["prior_logits"], leaves["decoder_weight"])
        options: dict[str, Any] = {"decoder_bias": leaves.get("decoder_bias"), "softcap": softcap, **form}
        loss = mos_cross_entropy(*positional, inputs["targets"], reduction=reduction, **options)
        gradients = torch.autograd.grad(loss.square().sum(), list(leaves.values()))
        results: Results = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
        results["loss"] = loss.detach()
        with torch.no_grad():
            results["log-probabilities"] = infer_log_probs(*positional, **options)
            if shortlist_size is None:
                results["reference"] = mos_log_probs(*positional, **options)
        yield f"{shortlist_size=}, {dtype}, {softcap=}, {has_bias=}, {reduction}", results


def through_models(inputs: dict[str, Any]) -> Iterator[tuple[str, Results]]:
    """Conversions in evaluation, generation and training."""
    for name, shortlist_size, dtype, scale in itertools.product(
        BACKBONES, (None, M), (torch.float32, torch.bfloat16), SCALES
    ):
        options = {"num_mixtures": K, "shortlist_size": shortlist_size, "latent_scale": scale}
        model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(name).to(dtype), **options)
        model.lm_head.load_state_dict(inputs["heads"][name], strict=False)
        yield f"{name}, {shortlist_size=}, {dtype}, {scale=}", outputs_of(model, inputs["input_ids"])


def outputs_of(model: Any, input_ids: Tensor) -> Results:
    labels = input_ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        evaluated = model(input_ids=input_ids, labels=labels)
        results: Results = {"evaluated loss": evaluated.loss, "log-probabilities": evaluated.logits}
        results["loss without logits"] = model(input_ids=input_ids, labels=labels, skip_logits=True).loss
        results["tokens"] = model.generate(input_ids, max_new_tokens=4, do_sample=False)
    results["logits with gradients"] = model(input_ids=input_ids).logits.detach()
    model.train()
    loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    results["loss"] = loss.detach()
    for name, gradient in zip(parameters, gradients, strict=True):
        results[f"gradient of {new_name(name)}"] = whole(model, name, gradient)
    head: Any = model.lm_head
    hidden = model.backbone(input_ids=input_ids).logits if WRAPS else model.head_inputs(input_ids=input_ids)
    options = ScoreOptions(1.3, SCORES)
    how = {"scores": options} if WRAPS else {"function": functools.partial(score_tokens, options)}
    scores = head(hidden.detach(), targets=input_ids, **how)
    results |= {name: score.detach() for name, score in zip(SCORES, scores, strict=True)}
    (gradient,) = torch.autograd.grad((scores[0] + scores[1]).sum(), [head.prior.weight])
    results["gradient of the scores"] = whole(model, "lm_head.prior.weight", gradient)
    return results


def new_name(name: str) -> str:
    return name.removeprefix("backbone.").replace("lm_head.decoder.", "lm_head.") if WRAPS else name


def whole(model: Any, name: str, gradient: Tensor | None) -> Tensor | None:
    """The gradient with the factor of the scale, which an old version leaves out."""
    lacks = WRAPS and name in ("lm_head.prior.weight", "lm_head.shift.weight")
    return gradient * model.lm_head.latent_scale if lacks and gradient is not None else gradient


def gap(before: Tensor | None, after: Tensor | None) -> float:
    """The norm of the difference in proportion to the old tensor's; zero if they are equal to the bit."""
    if before is None or after is None:
        return 0.0 if before is after else float("inf")
    if before.dtype != after.dtype or before.shape != after.shape:
        return float("inf")
    if torch.equal(before, after):
        return 0.0
    return max(float((after - before).double().norm() / before.double().norm()), 1e-300)


def main() -> None:
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    inputs = torch.load(file)["inputs"] if file.exists() else make_inputs()
    results = dict(itertools.chain(functions(inputs), through_models(inputs)))
    count = sum(len(tensors) for tensors in results.values())
    if not file.exists():
        torch.save({"inputs": inputs, "results": results}, file)
        print(f"wrote {count} tensors of {len(results)} cases to {file}")
        return
    saved = torch.load(file)["results"]
    assert saved.keys() == results.keys(), saved.keys() ^ results.keys()
    rounded, different = [], []
    for case, before in saved.items():
        after = results[case]
        assert before.keys() == after.keys(), (case, before.keys() ^ after.keys())
        for name in before:
            difference = gap(before[name], after[name])
            if not difference:
                continue
            tolerance = 0.02 if "bfloat16" in case else 1e-5
            rounds = "scale=None" in case and name.startswith("gradient") and difference < tolerance
            (rounded if rounds else different).append((difference, f"{case}: {name}"))
    print(f"{count - len(rounded) - len(different)} of {count} tensors of {len(results)} cases are equal to the bit")
    for dtype in ("float32", "bfloat16"):
        gaps = [difference for difference, where in rounded if f"torch.{dtype}" in where]
        if gaps:
            print(f"{len(gaps)} {dtype} gradients at a scale that rounds differ, by {max(gaps):.1e} of their norm")
    for difference, where in different:
        print(f"differs by {difference:.1e} of its norm: {where}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
