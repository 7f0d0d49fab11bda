"""Checks the fast loss against the readable reference, in float64 and in the dtypes used for training."""

import copy
import importlib
import itertools
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import LargestTensor, chunks_of
from torch.utils._python_dispatch import TorchDispatchMode

from hf_mos import MoSLMHead, mos_cross_entropy, mos_log_probs, remote_code
from hf_mos.remote_code.mos_decoder import CPU_BUDGET_BYTES
from hf_mos.remote_code.mos_log_probs import infer_log_probs

IGNORED = -100

# On all classes, and on a shortlist: of latents, of their mean and offsets, and of offsets that are to be widened.
FORMS = [(None, False), (3, False), (3, True), (3, "widened")]
RANK = 2


def draw(N=7, K=3, D=5, V=11, pair=False, bias=False, ignored="some", dtype=torch.float64, seed=0):
    """Leaves named by what they are, and targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {"prior_logits": normal(N, K), "decoder_weight": normal(V, D)}
    width = RANK if pair == "widened" else D
    leaves |= {"mean": normal(N, D), "offsets": normal(N, K, width)} if pair else {"latents": normal(N, K, D)}
    if pair == "widened":
        leaves["widening"] = normal(D, RANK)
    if bias:
        leaves["decoder_bias"] = normal(V)
    targets = torch.randint(0, V, (N,), generator=generator)
    if ignored == "some":
        targets[::3] = IGNORED
    elif ignored == "all":
        targets[:] = IGNORED
    return leaves, targets


def arguments(leaves, widens=True):
    offsets = leaves.get("offsets")
    if widens and "widening" in leaves:
        offsets = offsets @ leaves["widening"].T
    latents = leaves["latents"] if "latents" in leaves else (leaves["mean"], offsets)
    return (latents, leaves["prior_logits"], leaves["decoder_weight"]), leaves.get("decoder_bias")


def reference(leaves, targets, reduction="mean", **options):
    positional, bias = arguments(leaves)
    return reduce(mos_log_probs(*positional, decoder_bias=bias, **options), targets, reduction)


def shortlist_in_plain_torch(leaves, targets, shortlist_size, reduction="mean"):
    """The wide product and the products on the shortlist, to compare rounding with."""
    ((mean, offsets), _, weight), bias = arguments(leaves)
    shared = F.linear(mean, weight, bias)
    chosen = shared.float().topk(shortlist_size).indices
    differences = offsets @ weight[chosen].mT
    log_gate = leaves["prior_logits"].float().log_softmax(-1).unsqueeze(-1)
    mixed = torch.logsumexp(log_gate + shared.gather(1, chosen).unsqueeze(1).float() + differences.float(), 1)
    return reduce(shared.float().scatter(1, chosen, mixed).log_softmax(-1), targets, reduction)


def reduce(log_probs, targets, reduction):
    nll = F.nll_loss(log_probs, targets, reduction="none")
    if reduction == "none":
        return nll
    return nll.sum() / (1 if reduction == "sum" else (targets != IGNORED).sum().clamp(min=1))


def fast(leaves, targets, chunk_size=None, **options):
    positional, bias = arguments(leaves, widens=False)
    with chunks_of(chunk_size):
        return mos_cross_entropy(*positional, targets, decoder_bias=bias, widening=leaves.get("widening"), **options)


def run(loss_function, leaves, targets, requires_grad=None, **options):
    """The loss, and the gradient of every leaf that requires one, of the loss under uneven weights."""
    names = leaves if requires_grad is None else requires_grad
    leaves = {name: x.detach().clone().requires_grad_(name in names) for name, x in leaves.items()}
    loss = loss_function(leaves, targets, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (loss * weights).sum().backward()
    return {"loss": loss.detach()} | {name: leaves[name].grad for name in names}


def assert_same(expected, given):
    assert expected.keys() == given.keys()
    for name, value in expected.items():
        assert given[name].shape == value.shape, name
        torch.testing.assert_close(given[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("shortlist_size", "pair"), FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_reference_in_float64(shortlist_size, pair, reduction, softcap, bias):
    for (N, K), chunk_size, ignored in itertools.product(
        [(1, 1), (7, 3), (8, 2)], [None, 1, 3], ["none", "some", "all"]
    ):
        leaves, targets = draw(N=N, K=K, pair=pair, bias=bias, ignored=ignored)
        options = {"softcap": softcap, "reduction": reduction, "shortlist_size": shortlist_size}
        expected = run(reference, leaves, targets, **options)
        given = run(fast, leaves, targets, **options, chunk_size=chunk_size)
        assert_same(expected, given)


@pytest.mark.parametrize(("shortlist_size", "pair"), FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_alone(shortlist_size, pair, reduction):
    leaves, targets = draw(pair=pair, bias=True)
    options = {"softcap": 3.0, "reduction": reduction, "shortlist_size": shortlist_size}
    expected = run(reference, leaves, targets, **options)
    for name in leaves:
        given = run(fast, leaves, targets, requires_grad=[name], **options, chunk_size=2)
        assert_same({key: expected[key] for key in ("loss", name)}, given)


@pytest.mark.parametrize(("shortlist_size", "pair"), FORMS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(shortlist_size, pair, softcap):
    leaves, targets = draw(N=3, K=2, D=3, V=5, pair=pair, bias=True)
    names = list(leaves)

    def loss(*values):
        return fast(
            dict(zip(names, values, strict=True)),
            targets,
            softcap=softcap,
            reduction="none",
            shortlist_size=shortlist_size,
        )

    assert torch.autograd.gradcheck(loss, [leaves[name].requires_grad_() for name in names])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shortlist_size", [None, 20])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_errs_no_more_than_plain_torch(dtype, shortlist_size, reduction):
    leaves, targets = draw(N=96, K=3, D=16, V=53, pair=shortlist_size is not None, bias=True, dtype=dtype)
    if shortlist_size is not None:
        leaves["decoder_bias"][:shortlist_size] += 30  # a shortlist that rounding does not change
        leaves["offsets"] /= 4
    options = {"reduction": reduction, "shortlist_size": shortlist_size}
    exact = run(reference, {name: x.double() for name, x in leaves.items()}, targets, **options)
    plain = run(shortlist_in_plain_torch if shortlist_size else reference, leaves, targets, **options)
    given = run(fast, leaves, targets, **options, chunk_size=7)
    for name in exact:
        plain_error = (plain[name].double() - exact[name]).norm()
        error = (given[name].double() - exact[name]).norm()
        rounding = exact[name].norm() * torch.finfo(dtype).eps / 8
        assert error <= plain_error + rounding, f"{name}: {error:.2e} against {plain_error:.2e}"


@pytest.mark.parametrize("compiles", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "fp16 weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{"shortlist_size": None}, {"shortlist_size": 16}, {"shortlist_size": 16, "shift_rank": 4}], ids=str
)
def test_a_loss_scale_keeps_the_small_gradients_of_fp16(options, reduction, whole, compiles):
    """As many rows of the decoder get a gradient as with one softmax: all, also where the model is confident."""
    N, D, V, scale = 128, 32, 2048, 2.0**16 if reduction == "mean" else 2.0**9
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    hidden_states = 6 / D**0.5 * weight[targets] + 0.2 * torch.randn(N, D, generator=generator)
    head = MoSLMHead(D, V, num_mixtures=3, **options)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.shift.weight.normal_(std=0.02 / head.latent_scale, generator=generator)

    def gradients(loss_of, dtype, scale):
        module = copy.deepcopy(head).to(dtype if whole else torch.float32)
        states = hidden_states.detach().to(module.weight.dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16 and not whole):
            loss = loss_of(module, states)
        (loss * scale).backward()
        given = {name: parameter.grad for name, parameter in module.named_parameters()} | {"states": states.grad}
        return {name: gradient.double() / scale for name, gradient in given.items() if gradient is not None}

    def softmax_loss(module, states):
        logits = F.linear(states, module.weight).float()
        return F.cross_entropy(logits, targets, reduction=reduction)

    def mixture_loss(module, states):
        function = torch.compile(module, backend="eager", fullgraph=True) if compiles else module
        return function(states, targets, reduction=reduction)

    torch.compiler.reset()
    softmax = gradients(softmax_loss, torch.float16, scale)
    mixture, exact = gradients(mixture_loss, torch.float16, scale), gradients(mixture_loss, torch.float32, 1)
    assert softmax["weight"].any(dim=1).all()
    assert mixture["weight"].any(dim=1).all()
    assert mixture.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (mixture[name] - gradient).norm() < 0.03 * gradient.norm(), name
    rare = exact["weight"].norm(dim=1) < exact["weight"].norm(dim=1).median()
    assert (mixture["weight"] - exact["weight"])[rare].norm() < 0.03 * exact["weight"][rare].norm()


def test_autocast_runs_products_in_its_dtype_and_keeps_gradients_wide():
    leaves, targets = draw(N=32, D=16, V=53, dtype=torch.float32)
    exact = run(fast, leaves, targets)

    def under_autocast(leaves, targets):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fast(leaves, targets)

    given = run(under_autocast, leaves, targets)
    for name, value in exact.items():
        assert given[name].dtype == torch.float32
        assert not torch.equal(given[name], value), f"{name} was not computed in bfloat16"
        torch.testing.assert_close(given[name], value, rtol=0.05, atol=0.02)


def test_sharp_logits_stay_finite_where_probabilities_underflow():
    leaves, targets = draw(N=6, V=50, ignored="none", dtype=torch.float32)
    leaves["latents"] *= 100
    exact = run(reference, {name: x.double() for name, x in leaves.items()}, targets)
    given = run(fast, leaves, targets)
    assert exact["loss"] > 100  # beyond what log(p) can say in fp32
    for name, value in exact.items():
        torch.testing.assert_close(given[name].double(), value, rtol=1e-4, atol=1e-4)


class CountProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "gradients", "products"), [((), True, 3), (("decoder_weight",), True, 2), ((), False, 1)]
)
def test_makes_no_product_that_nobody_needs(frozen, gradients, products):
    N, K, D, V = 8, 2, 16, 64
    leaves, targets = draw(N=N, K=K, D=D, V=V, ignored="none")
    leaves = {name: x.requires_grad_(name not in frozen) for name, x in leaves.items()}
    with CountProducts() as counter, torch.set_grad_enabled(gradients):
        loss = fast(leaves, targets)
        if gradients:
            loss.backward()
    assert counter.products == products


def test_second_backward_through_a_retained_graph():
    leaves, targets = draw()
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    loss = fast(leaves, targets)
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(3 * loss, list(leaves.values()))
    for one, three in zip(first, second, strict=True):
        torch.testing.assert_close(3 * one, three)


def test_non_contiguous_arguments():
    leaves, targets = draw()
    strided = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in leaves.items()}
    assert_same(run(fast, leaves, targets), run(fast, strided, targets))


def test_all_ignored_gives_finite_zeros():
    leaves, targets = draw(ignored="all", bias=True)
    for value in run(fast, leaves, targets).values():
        assert torch.equal(value, torch.zeros_like(value))


def test_integer_targets_of_any_width():
    leaves, targets = draw()
    assert_same(run(fast, leaves, targets), run(fast, leaves, targets.int()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((7,), 11)}, "below 11"),
        ({"targets": torch.zeros(6, dtype=torch.long)}, "targets: expected"),
        ({"targets": torch.zeros(7)}, "integer class indices"),
        ({"prior_logits": torch.zeros(7, 4, dtype=torch.float64)}, "prior_logits: expected"),
        ({"decoder_weight": torch.zeros(11, 4, dtype=torch.float64)}, "decoder_weight: expected"),
        ({"decoder_weight": torch.zeros(11, 5)}, "latents: expected the decoder's torch.float32"),
        ({"decoder_bias": torch.zeros(10, dtype=torch.float64)}, "decoder_bias: expected"),
        ({"reduction": "average"}, "reduction: expected"),
        ({"widening": torch.zeros(5, 2)}, "widening: expected"),
        ({"shortlist_size": 0}, "shortlist_size: expected an int of at least 1, or None, given 0"),
        ({"latents": (torch.zeros(7, 5), torch.zeros(7, 3, 5))}, "shortlist_size: expected an int"),
        ({"latents": (torch.zeros(7, 5), torch.zeros(7, 3, 4)), "shortlist_size": 3}, "latents: expected"),
        (
            {
                "latents": (torch.zeros(7, 5), torch.zeros(7, 3, 2)),
                "shortlist_size": 3,
                "widening": torch.zeros(5, 3),
            },
            r"widening: expected \(D, r\) with offsets \(N, K, r\), given \(5, 3\)",
        ),
    ],
)
def test_bad_input_names_what_was_expected(change, message):
    leaves, targets = draw()
    with pytest.raises(ValueError, match=message):
        mos_cross_entropy(**{**leaves, "targets": targets, **change})


@pytest.mark.parametrize(("shortlist_size", "pair"), FORMS)
@pytest.mark.parametrize("N", [1, 2, 40])
def test_inference_equals_reference(shortlist_size, pair, N):
    leaves, _ = draw(N=N, K=4, pair=pair, bias=True)
    positional, bias = arguments(leaves)
    options = {"decoder_bias": bias, "softcap": 2.0, "shortlist_size": shortlist_size}
    torch.testing.assert_close(infer_log_probs(*positional, **options), mos_log_probs(*positional, **options))


@pytest.mark.parametrize(("shortlist_size", "pair"), FORMS)
def test_inference_keeps_what_underflows_and_what_cannot_be(shortlist_size, pair):
    """Log-probabilities far below the smallest number of fp32, and classes that no component gives a probability."""
    leaves, _ = draw(N=3, K=4, pair=pair, bias=True, dtype=torch.float32)
    leaves["decoder_bias"][2:4] = torch.tensor([-500.0, float("-inf")])
    positional, bias = arguments(leaves)
    options = {"decoder_bias": bias, "shortlist_size": shortlist_size}
    inferred = infer_log_probs(*positional, **options)
    torch.testing.assert_close(inferred, mos_log_probs(*positional, **options))
    assert (inferred[:, 2] < -400).all()
    assert (inferred[:, 3] == float("-inf")).all()


@pytest.mark.parametrize(("dtype", "bytes_per_logit"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_inference_keeps_to_its_budget(dtype, bytes_per_logit):
    """The component logits of a server's batch go through in chunks, and are mixed in place."""
    N, K, V = 64, 8, 50_000
    latents, prior_logits, weight = (
        torch.randn(N, K, 4, dtype=dtype),
        torch.randn(N, K),
        torch.randn(V, 4, dtype=dtype),
    )
    with LargestTensor() as largest:
        infer_log_probs(latents, prior_logits, weight)
    assert N * V < largest.numel <= CPU_BUDGET_BYTES / bytes_per_logit < N * K * V


@pytest.mark.parametrize(
    ("V", "trains_decoder", "rows"),
    [
        (50_000, True, 156),
        (50_000, False, 156),
        (100_000, True, 128),
        (100_000, False, 78),
        (300_000, True, 104),
        (300_000, False, 32),
    ],
)
def test_training_keeps_to_its_budget(V, trains_decoder, rows):
    """Each chunk adds to the whole gradient of a trained decoder, so it has more rows there, in 126 MiB at most."""
    N, K = 312, 2
    latents, prior_logits = torch.randn(N, K, 2, requires_grad=True), torch.randn(N, K, requires_grad=True)
    weight = torch.randn(V, 2, requires_grad=trains_decoder)
    with LargestTensor() as largest:
        mos_cross_entropy(latents, prior_logits, weight, torch.randint(V, (N,))).backward()
    assert 0.95 * rows * V < largest.numel <= rows * V


@pytest.mark.parametrize(("shortlist_size", "pair"), FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole_without_recompiling(shortlist_size, pair, reduction):
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for seed in range(3):  # another number of ignored targets each time
        leaves, targets = draw(pair=pair, bias=True, seed=seed)
        targets[:seed] = IGNORED
        options = {"reduction": reduction, "softcap": 2.0, "shortlist_size": shortlist_size}
        expected = run(fast, leaves, targets, **options)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            given = run(compiled, leaves, targets, **options)
        assert_same(expected, given)


def test_the_code_beside_a_checkpoint_compiles_too(tmp_path):
    """With a break of the graph; a process may load the package and, as remote code, its copy."""
    shutil.copytree(remote_code.__path__[0], tmp_path / "copy_of_mos")
    sys.path.insert(0, str(tmp_path))
    try:
        copied = importlib.import_module("copy_of_mos.mos_loss").mos_cross_entropy
    finally:
        sys.path.remove(str(tmp_path))
    leaves, targets = draw()
    positional, _ = arguments(leaves)
    for function in (copied, mos_cross_entropy, copied):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=function is mos_cross_entropy, backend="aot_eager")
        torch.testing.assert_close(compiled(*positional, targets), mos_cross_entropy(*positional, targets))


@pytest.mark.parametrize(("shortlist_size", "pair"), FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(shortlist_size, pair, reduction):
    leaves, targets = draw(pair=pair)
    weight = leaves["decoder_weight"].requires_grad_()
    loss = fast(leaves, targets, reduction=reduction, shortlist_size=shortlist_size).sum()
    with pytest.raises(
        RuntimeError, match="create_graph: expected False, as the loss with labels is differentiable once"
    ):
        torch.autograd.grad(loss, weight, create_graph=True)
