"""Checks torch's ways to use a module or a gradient, on the mixture: each gives the right value or raises by name."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import HEADS, random_tokens, tiny_causal_lm, tiny_mos
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.nn.modules import module as all_modules
from torch.utils.flop_counter import FlopCounterMode

from hf_mos import MoSForCausalLM

# torch's own: each first use of torch.func's forward mode compiles with the deprecated torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

TOKENS = random_tokens()
TARGETS = torch.tensor([1, 2, 3])
HIDDEN = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
ONCE = "create_graph: expected False, as the loss with labels is differentiable once"


def loss(model: Any) -> Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def gradients(model: MoSForCausalLM) -> dict[str, Tensor]:
    """The gradients of the loss through the logits, in plain operations."""
    model = copy.deepcopy(model).train()
    model.skip_logits_in_training = False
    log_probs = model(input_ids=TOKENS).logits[:, :-1].flatten(0, 1)
    F.nll_loss(log_probs, TOKENS[:, 1:].flatten()).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(given[name], expected[name], atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------- torch.func and higher derivatives


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")  # of torch's attention
@pytest.mark.parametrize("form", HEADS, ids=str)
def test_torch_func_gradients_of_the_weights(form: dict[str, Any]) -> None:
    model = tiny_mos(**form).train()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def of_batch(weights: Any) -> Tensor:
        return functional_call(model, weights, kwargs={"input_ids": TOKENS, "labels": TOKENS}).loss

    def of_row(weights: Any, row: Tensor) -> Tensor:
        return functional_call(model, weights, kwargs={"input_ids": row[None], "labels": row[None]}).loss

    expected = gradients(model)
    assert_same(grad(of_batch)(weights), expected)
    value, pullback = vjp(of_batch, weights)
    assert_same(pullback(torch.ones(()))[0], expected)
    torch.testing.assert_close(value, loss(model))
    per_row = vmap(grad(of_row), in_dims=(None, 0))(weights, TOKENS)
    assert_same({name: rows.mean(0) for name, rows in per_row.items()}, expected)
    compiled = torch.compile(grad(of_batch), backend="eager")
    assert_same(compiled(weights), expected)


@pytest.mark.parametrize("form", HEADS, ids=str)
@pytest.mark.parametrize("transform", [jacrev, hessian, lambda f: lambda h: jvp(f, (h,), (torch.ones_like(h),))])
def test_torch_func_derivatives_of_the_hidden_states(transform: Callable[..., Any], form: dict[str, Any]) -> None:
    head = tiny_mos(**form).lm_head
    given = transform(lambda h: head(h, targets=TARGETS))(HIDDEN)
    expected = transform(lambda h: F.nll_loss(head(h), TARGETS))(HIDDEN)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("form", HEADS, ids=str)
def test_torch_func_vmap_without_gradients(form: dict[str, Any]) -> None:
    head = tiny_mos(**form).lm_head
    with torch.no_grad():
        torch.testing.assert_close(vmap(head)(HIDDEN.unsqueeze(1)).squeeze(1), head(HIDDEN))


@pytest.mark.parametrize("form", HEADS, ids=str)
@pytest.mark.parametrize("with_grad", [True, False])
def test_forward_mode(with_grad: bool, form: dict[str, Any]) -> None:
    head = tiny_mos(**form).requires_grad_(False).lm_head
    step = 1e-3 * torch.ones_like(HIDDEN, dtype=torch.float64)
    with torch.set_grad_enabled(with_grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(HIDDEN, torch.ones_like(HIDDEN))
        tangents = [
            forward_ad.unpack_dual(value).tangent
            for value in (head(dual, targets=TARGETS), F.nll_loss(head(dual), TARGETS))
        ]
    wide = copy.deepcopy(head).double()
    ahead, behind = (wide(HIDDEN.double() + sign * step, targets=TARGETS) for sign in (1, -1))
    for tangent in tangents:
        torch.testing.assert_close(tangent.double(), (ahead - behind) / 2e-3, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", HEADS, ids=str)
@pytest.mark.parametrize("backend", [None, "eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_second_derivative_is_refused_by_name(backend: str | None, form: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = tiny_mos(**form).train()
    called = model if backend is None else torch.compile(model, backend=backend)
    error = "does not currently support double backward" if backend == "aot_eager" else ONCE

    def differentiate_twice() -> None:
        (first,) = torch.autograd.grad(loss(called), [model.lm_head.shift.weight], create_graph=True)
        first.sum().backward()

    with pytest.raises(RuntimeError, match=error):
        differentiate_twice()


@pytest.mark.parametrize("form", HEADS, ids=str)
def test_a_second_derivative_through_the_logits(form: dict[str, Any]) -> None:
    head = tiny_mos(**form).double().lm_head
    hidden = HIDDEN.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda h: F.nll_loss(head(h), TARGETS), (hidden,))
    assert torch.autograd.gradcheck(lambda h: head(h, targets=TARGETS), (hidden,))


@pytest.mark.parametrize("form", HEADS, ids=str)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_other_backends_of_torch_compile(backend: str, form: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = tiny_mos(**form).train()
    expected = gradients(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    value = loss(compiled)
    torch.testing.assert_close(value, loss(model))
    value.backward()
    assert_same({n: w.grad for n, w in model.named_parameters() if w.grad is not None}, expected)


# --------------------------------------------------------------------------------------------------------------- hooks

REGISTER: dict[str, Callable[..., Any]] = {
    "forward": nn.Module.register_forward_hook,
    "forward_pre": nn.Module.register_forward_pre_hook,
    "backward": nn.Module.register_full_backward_hook,
    "backward_pre": nn.Module.register_full_backward_pre_hook,
    "global forward": lambda _, hook: all_modules.register_module_forward_hook(hook),
    "global forward_pre": lambda _, hook: all_modules.register_module_forward_pre_hook(hook),
    "global backward": lambda _, hook: all_modules.register_module_full_backward_hook(hook),
    "global backward_pre": lambda _, hook: all_modules.register_module_full_backward_pre_hook(hook),
}


@contextmanager
def calls_seen(kind: str, layer: nn.Module) -> Iterator[list[str]]:
    seen: list[str] = []

    def hook(module: nn.Module, *arguments: Any) -> None:
        if module is layer:
            seen.append(kind)

    handle = REGISTER[kind](layer, hook)
    try:
        yield seen
    finally:
        handle.remove()


# torch's own, of global hooks on other modules.
@pytest.mark.filterwarnings("ignore:For backward hooks to be called, module output:UserWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("form", HEADS, ids=str)
@pytest.mark.parametrize("layer", ["prior", "shift", "itself"])
@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_are_called(kind: str, layer: str, form: dict[str, Any]) -> None:
    model = tiny_mos(**form).train()
    expected, expected_loss = gradients(model), loss(model)
    with calls_seen(kind, getattr(model.lm_head, layer, model.lm_head)) as seen:
        value = loss(model)
        value.backward()
        assert seen
        if "forward" in kind:
            for without_labels in (True, False):
                seen.clear()
                with torch.no_grad():
                    model.eval()(input_ids=TOKENS) if without_labels else loss(model)
                assert seen
    torch.testing.assert_close(value, expected_loss)
    assert_same({n: w.grad for n, w in model.named_parameters() if w.grad is not None}, expected)


# ----------------------------------------------------------------------------- tracing, quantisation, counting of work


class LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False, return_dict=False)[0]


# Tracing is deprecated, reads each attribute of a module, and warns of the backbone's own branches.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_trace_suits_other_lengths(dtype: torch.dtype, form: dict[str, Any]) -> None:
    module = LogitsOnly(tiny_mos(**form).to(dtype))
    with torch.no_grad():
        traced = torch.jit.trace(module, (TOKENS,), check_trace=False)
        for tokens in (random_tokens(3, 40), random_tokens(1, 5)):
            tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4  # its products round otherwise in other shapes
            torch.testing.assert_close(traced(tokens), module(tokens), atol=tolerance, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("form", HEADS, ids=str)
def test_dynamic_quantisation(form: dict[str, Any]) -> None:
    model = tiny_mos(**form).eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if hasattr(module, "weight") and callable(module.weight):
                rounded.get_submodule(name).weight.copy_(module.weight().dequantize())
        log_probs = quantised(input_ids=TOKENS).logits
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 12))
        torch.testing.assert_close(loss(quantised), loss(rounded), atol=0.1, rtol=0)  # inputs are rounded too
        torch.testing.assert_close(
            loss(quantised), F.nll_loss(log_probs[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        )


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("M", [None, 5])
@torch.no_grad()
def test_flops_of_inference(M: int | None, with_labels: bool) -> None:
    softmax, K, D, V = tiny_causal_lm(), 3, 32, 97
    model = tiny_mos(num_mixtures=K, shortlist_size=M).eval()
    inputs = {"input_ids": TOKENS} | ({"labels": TOKENS} if with_labels else {})
    head = 2 * TOKENS.numel() * D * (K * D + K + (K * V if M is None else V + K * M))
    ours, theirs = (flops(lambda m=m: m(**inputs)) for m in (model, softmax))
    assert ours - theirs == head - 2 * TOKENS.numel() * D * V


@pytest.mark.parametrize("M", [None, 5])
def test_flops_of_training(M: int | None) -> None:
    """The gradients are made in the forward pass, and counted there."""
    softmax, K, D, V = tiny_causal_lm().train(), 3, 32, 97
    model = tiny_mos(num_mixtures=K, shortlist_size=M).train()
    ours, theirs = (flops(lambda m=m: loss(m).backward()) for m in (model, softmax))
    decoder = 22 * D * (K * V if M is None else V + K * M)  # of 24 positions 22 have a label
    assert (ours - theirs) / theirs == pytest.approx(
        3 * 2 * (decoder - 24 * D * V + 24 * D * (K * D + K)) / theirs, rel=1e-2
    )
