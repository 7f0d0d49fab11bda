"""Checks, on random shapes, dtypes and options, the properties that hold for all of them."""

import torch
import torch.nn.functional as F
from helpers import chunks_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_mos import mos_cross_entropy, mos_log_probs
from hf_mos.remote_code.mos_log_probs import infer_log_probs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def mixtures(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES, num_mixtures: int | None = None) -> dict:
    """Arguments of `mos_cross_entropy`."""
    N, D, V = (draw(st.integers(1, high)) for high in (7, 9, 23))
    K = num_mixtures or draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(dtypes))
    scale = draw(st.sampled_from([0.1, 1.0, 20.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shortlist_size = draw(st.none() | st.integers(1, 25))
    targets = torch.randint(0, V, (N,), generator=generator)
    if draw(st.booleans()):
        targets[torch.randint(0, N, (1,), generator=generator)] = -100
    return {
        "latents": (scale * normal(N, K, D)).to(dtype),
        "prior_logits": (scale * normal(N, K)).to(torch.promote_types(dtype, torch.float32)),
        "decoder_weight": (normal(V, D) * D**-0.5).to(dtype),
        "targets": targets,
        "decoder_bias": normal(V).to(dtype) if draw(st.booleans()) else None,
        "softcap": draw(st.sampled_from([None, 5.0, 30.0])),
        "shortlist_size": shortlist_size,
        "chunk_size": draw(st.sampled_from([None, 1, 3])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }


def log_probs(mixture: dict, function=mos_log_probs) -> torch.Tensor:
    options = {name: mixture[name] for name in ("decoder_bias", "softcap", "shortlist_size")}
    return function(mixture["latents"], mixture["prior_logits"], mixture["decoder_weight"], **options)


def loss(mixture: dict, **changes) -> torch.Tensor:
    arguments = mixture | changes
    positional = [arguments.pop(name) for name in ("latents", "prior_logits", "decoder_weight", "targets")]
    with chunks_of(arguments.pop("chunk_size")):
        return mos_cross_entropy(*positional, **arguments)


def in_fp64(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def tolerance(mixture: dict) -> float:
    """What rounding the logits allows: they are up to some hundred."""
    size = float(log_probs({name: in_fp64(value) for name, value in mixture.items()}).abs().max())
    return 60 * EPSILON[mixture["latents"].dtype] * (1 + size)


@MANY
@given(mixtures())
def test_rows_sum_to_one(mixture: dict) -> None:
    for function in (mos_log_probs, infer_log_probs):
        total = log_probs(mixture, function).double().exp().sum(-1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


@MANY
@given(mixtures())
def test_the_loss_is_the_references(mixture: dict) -> None:
    exact = log_probs({name: in_fp64(value) for name, value in mixture.items()})
    expected = F.nll_loss(exact, mixture["targets"], reduction="none")
    if mixture["reduction"] != "none":
        expected = expected.sum()
    if mixture["reduction"] == "mean":
        expected = expected / (mixture["targets"] != -100).sum().clamp(min=1)
    ours = loss(mixture)
    assert ours.shape == expected.shape
    assert (ours.double() - expected).abs().max() <= tolerance(mixture) * len(mixture["targets"])


@MANY
@given(mixtures())
def test_gradients_are_finite(mixture: dict) -> None:
    leaves = [mixture[name] for name in ("latents", "prior_logits", "decoder_weight")]
    if mixture["decoder_bias"] is not None:
        leaves.append(mixture["decoder_bias"])
    for leaf in leaves:
        leaf.requires_grad_()
    loss(mixture).sum().backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.isfinite().all()


@MANY
@given(mixtures(num_mixtures=1))
def test_one_component_is_a_softmax(mixture: dict) -> None:
    logits = F.linear(
        in_fp64(mixture["latents"])[:, 0], in_fp64(mixture["decoder_weight"]), in_fp64(mixture["decoder_bias"])
    )
    if mixture["softcap"]:
        logits = mixture["softcap"] * torch.tanh(logits / mixture["softcap"])
    expected = F.cross_entropy(logits, mixture["targets"], reduction="sum")
    ours = loss(mixture | {"reduction": "sum"})
    assert (ours.double() - expected).abs() <= tolerance(mixture) * len(mixture["targets"])


@MANY
@given(mixtures(dtypes=[torch.float64, torch.float32]), st.randoms(use_true_random=False))
def test_permuting_components_changes_nothing(mixture: dict, random) -> None:
    K = mixture["prior_logits"].shape[1]
    order = random.sample(range(K), K)
    changed = {name: mixture[name][:, order] for name in ("latents", "prior_logits")}
    gap = (loss(mixture) - loss(mixture, **changed)).abs().max()
    assert gap <= tolerance(mixture) * len(mixture["targets"])


@MANY
@given(mixtures(dtypes=[torch.float64, torch.float32]), st.floats(-50, 50))
def test_a_constant_on_all_logits_changes_nothing(mixture: dict, constant: float) -> None:
    mixture["softcap"] = None  # which is not linear
    V = mixture["decoder_weight"].shape[0]
    bias = torch.zeros(V).to(mixture["decoder_weight"]) if mixture["decoder_bias"] is None else mixture["decoder_bias"]
    changed = {"decoder_bias": bias + constant, "prior_logits": mixture["prior_logits"] - constant}
    gap = (loss(mixture) - loss(mixture, **changed)).abs().max()
    assert gap <= (tolerance(mixture) + 200 * 60 * EPSILON[bias.dtype]) * len(mixture["targets"])
