"""Checks the head alone: its outputs, its initialisation, and its extension point."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mos import MoSLMHead

D, V, N = 12, 31, 10


def make_head(bias=False, dtype=None, head_class=MoSLMHead, **options):
    torch.manual_seed(0)
    linear = nn.Linear(D, V, bias=bias, dtype=dtype)
    return head_class.take_over(linear, **{"num_mixtures": 3, "shortlist_size": None, **options})


def trained(head):
    """Away from its initialisation, where all components are equal."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in (head.prior, head.shift):
            layer.weight.add_(0.3 / head.latent_scale * torch.randn_like(layer.weight))
        if head.widening is not None:
            head.widening.weight.add_(0.1 * torch.randn_like(head.widening.weight))
    return head


def inputs():
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(2, N // 2, D, generator=generator)
    targets = torch.randint(0, V, (2, N // 2), generator=generator)
    targets[0, :2] = -100
    return hidden_states, targets


def by_hand(head, hidden_states):
    """The paper's equation, in probability space and float64."""
    h, weight = hidden_states.double(), head.weight.double()
    bias = None if head.bias is None else head.bias.double()
    prior = F.softmax(F.linear(head.latent_scale * h, head.prior.weight.double()), dim=-1)
    shifts = F.linear(h, head.shift.weight.double()).unflatten(-1, (head.num_mixtures, -1))
    shifts = shifts if head.widening is None else F.linear(shifts, head.widening.weight.double())
    latents = h.unsqueeze(-2) + head.latent_scale * shifts
    logits = F.linear(latents, weight, bias)
    if head.shortlist_size is not None:
        shared = F.linear(latents.mean(-2), weight, bias)
        inside = (
            torch.zeros_like(shared).scatter(-1, shared.topk(min(V, head.shortlist_size)).indices, 1).unsqueeze(-2)
        )
        logits = torch.where(inside > 0, logits, shared.unsqueeze(-2))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if head.shortlist_size is not None:
        prior = F.normalize(prior * logits.exp().sum(-1), p=1, dim=-1)
    return (prior.unsqueeze(-1) * F.softmax(logits, dim=-1)).sum(-2).log()


OPTIONS = [
    {},
    {"num_mixtures": 1},
    {"bias": True},
    {"softcap": 3.0},
    {"latent_scale": 0.3},
    {"shift_rank": 4},
    {"shift_rank": None},
    {"shortlist_size": 5},
    {"shortlist_size": V + 1},
    {"shortlist_size": 5, "num_mixtures": 1},
    {"shortlist_size": 5, "shift_rank": 4},  # the shortlists of 10 tokens have more rows than the decoder
    {"shortlist_size": 5, "shift_rank": 1, "softcap": 3.0, "bias": True},
    {"shortlist_size": 3, "shift_rank": 4},  # and fewer
    {"shortlist_size": 5, "latent_scale": 0.3, "softcap": 3.0, "bias": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_log_probabilities_are_the_papers(options, gradients):
    head = trained(make_head(**options))
    hidden_states, _ = inputs()
    with torch.set_grad_enabled(gradients):
        log_probs = head(hidden_states)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), by_hand(head, hidden_states), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, N // 2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_the_papers_and_its_gradients_are_true(options, reduction):
    head = trained(make_head(**options)).double()
    hidden_states, targets = inputs()
    hidden_states = hidden_states.double().requires_grad_()
    log_probs = by_hand(head, hidden_states).flatten(0, 1)
    expected = F.nll_loss(log_probs, targets.flatten(), reduction=reduction)
    loss = head(hidden_states, targets=targets, reduction=reduction)
    torch.testing.assert_close(loss, expected.view(loss.shape))
    leaves = [hidden_states, *head.parameters()]
    exact = torch.autograd.grad(expected.sum(), leaves)
    for one, other in zip(torch.autograd.grad(loss.sum(), leaves), exact, strict=True):
        torch.testing.assert_close(one, other)
    of_logits = F.nll_loss(head(hidden_states).flatten(0, 1), targets.flatten(), reduction=reduction)
    for one, other in zip(torch.autograd.grad(of_logits.sum(), leaves), exact, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_components_are_those_of_the_mixture(options):
    head = trained(make_head(**options))
    hidden_states, _ = inputs()
    with torch.no_grad():
        log_weights, logits = head.components(hidden_states)
        mixed = torch.logsumexp(log_weights.unsqueeze(-1) + logits.log_softmax(-1), dim=-2)
        torch.testing.assert_close(mixed, head(hidden_states))
    assert log_weights.shape == (2, N // 2, head.num_mixtures)
    assert logits.shape == (2, N // 2, head.num_mixtures, V)
    torch.testing.assert_close(log_weights.exp().sum(-1), torch.ones(2, N // 2))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "bias": True}, {"shortlist_size": 5}], ids=str)
def test_starts_as_one_softmax_and_parts_when_trained(options):
    head = make_head(**options)
    hidden_states, targets = inputs()
    logits = F.linear(hidden_states, head.weight, head.bias)
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(head(hidden_states), F.log_softmax(logits, dim=-1), atol=1e-6, rtol=0)

    clones = copy.deepcopy(head)
    nn.init.zeros_(clones.prior.weight)
    for model, parts in ((head, True), (clones, False)):
        rate = 1.0 / model.latent_scale
        optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model.prior.weight], lr=rate)
        for _ in range(5):
            optimizer.zero_grad()
            model(hidden_states, targets=targets).backward()
            optimizer.step()
        assert (model.latents(hidden_states).std(dim=-2).max() > 1e-3) == parts


def test_takes_over_a_linear_layer_in_place():
    linear = nn.Linear(D, V, dtype=torch.bfloat16)
    weight, bias = linear.weight, linear.bias
    head = MoSLMHead.take_over(linear, num_mixtures=4, shortlist_size=None)
    assert head is linear
    assert isinstance(head, nn.Linear)
    assert head.weight is weight
    assert head.bias is bias
    assert (head.num_mixtures, head.shortlist_size, head.softcap) == (4, None, None)
    assert (head.in_features, head.out_features) == (D, V)
    assert head.latent_scale == pytest.approx(320 / D)
    assert {name: tuple(w.shape) for name, w in head.named_parameters()} == {
        "weight": (V, D),
        "bias": (V,),
        "prior.weight": (4, D),
        "shift.weight": (4 * D, D),
    }


class Squashed(MoSLMHead):
    """Latents that are no sum, as the paper's are not."""

    def latents(self, hidden_states):
        return torch.tanh(self.shift(hidden_states)).unflatten(-1, (self.num_mixtures, -1))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "bias": True}, {"shortlist_size": 5}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_subclass_may_have_latents_of_its_own(options, reduction):
    head = trained(make_head(head_class=Squashed, **options)).double()
    assert type(head) is Squashed
    hidden_states, targets = inputs()
    hidden_states = hidden_states.double().requires_grad_()
    prior = F.log_softmax(head.prior(head.latent_scale * hidden_states), dim=-1)
    logits = F.linear(head.latents(hidden_states), head.weight, head.bias)
    shared = F.linear(head.latents(hidden_states).mean(-2), head.weight, head.bias)
    if head.shortlist_size is not None:
        inside = (
            torch.zeros_like(shared).scatter(-1, shared.topk(min(V, head.shortlist_size)).indices, 1).unsqueeze(-2)
        )
        logits = torch.where(inside > 0, logits, shared.unsqueeze(-2))
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    if head.shortlist_size is not None:
        prior = F.log_softmax(prior + logits.logsumexp(-1), dim=-1)
    log_probs = torch.logsumexp(prior.unsqueeze(-1) + F.log_softmax(logits, dim=-1), dim=-2)
    expected = F.nll_loss(log_probs.flatten(0, 1), targets.flatten(), reduction=reduction)
    loss = head(hidden_states, targets=targets, reduction=reduction)
    torch.testing.assert_close(loss, expected.view(loss.shape))
    leaves = [hidden_states, *head.parameters()]
    gradients = (torch.autograd.grad(value.sum(), leaves) for value in (loss, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden_states), log_probs)


@pytest.mark.parametrize("of_instance", [False, True])
@pytest.mark.parametrize("options", [{}, {"shortlist_size": 5}, {"shortlist_size": 5, "shift_rank": 4}], ids=str)
@pytest.mark.parametrize("name", ["latents", "shifts", "codes", "widen", "prior_logits"])
def test_a_part_that_is_replaced_counts_in_loss_and_log_probabilities(name, options, of_instance):
    head = trained(make_head(**options)).double()
    hidden_states, targets = inputs()
    hidden_states = hidden_states.double()
    before = head(hidden_states)

    def changed(self, *arguments):
        return torch.sin(2 * getattr(MoSLMHead, name)(self, *arguments))

    if of_instance:
        setattr(head, name, types.MethodType(changed, head))
    else:
        head.__class__ = type("Changed", (MoSLMHead,), {name: changed})
    log_probs = head(hidden_states)
    assert not torch.allclose(log_probs, before)
    torch.testing.assert_close(
        head(hidden_states, targets=targets), F.nll_loss(log_probs.flatten(0, 1), targets.flatten())
    )
    with torch.no_grad():
        torch.testing.assert_close(head(hidden_states), log_probs)


def test_a_head_takes_over_another_head():
    head = trained(make_head())
    prior, shift = head.prior.weight, head.shift.weight
    other = Squashed.take_over(head, num_mixtures=2, shortlist_size=None, latent_scale=1.0)
    assert other is head
    assert type(other) is Squashed
    assert (other.num_mixtures, other.latent_scale) == (2, 1.0)
    assert other.prior.weight is not prior
    assert other.shift.weight is not shift
    assert other.shift.weight.shape == (2 * D, D)


def test_the_prior_stays_wide_in_half_precision():
    head = make_head(dtype=torch.bfloat16)
    assert head.prior.weight.dtype == torch.float32
    assert head.shift.weight.dtype == torch.bfloat16
    hidden_states, targets = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.prior_logits(hidden_states).dtype == torch.float32
    assert head(hidden_states.bfloat16()).dtype == torch.float32
    head(hidden_states.bfloat16(), targets=targets).backward()
    assert head.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("shortlist_size", [None, 5])
def test_the_mean_and_the_offsets_are_those_of_the_latents(shortlist_size):
    head = trained(make_head(shortlist_size=shortlist_size)).double()
    hidden_states = inputs()[0].double()
    mean, offsets = head.mean_and_offsets(hidden_states)
    latents = head.latents(hidden_states)
    assert latents.shape == (2, N // 2, 3, D)
    torch.testing.assert_close(mean, latents.mean(-2))
    torch.testing.assert_close(mean.unsqueeze(-2) + offsets, latents)


def test_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"targets: expected \(2, 5\), given \(2, 4\)"):
        make_head()(inputs()[0], targets=torch.zeros(2, 4, dtype=torch.long))


class Packed(nn.Module):
    """A quantizer's layer, which has no `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.codes = linear.weight

    def forward(self, hidden_states):
        return F.linear(hidden_states, self.codes)


@pytest.mark.parametrize("options", [{}, {"shortlist_size": 5}, {"shortlist_size": 5, "shift_rank": 4}], ids=str)
@pytest.mark.parametrize("packed", [["shift"], ["prior", "shift", "widening"]], ids=str)
def test_layers_of_a_quantizer_that_have_no_weight(packed, options):
    head, (hidden_states, targets) = trained(make_head(**options)), inputs()
    expected = head(hidden_states), head(hidden_states, targets)
    for name in packed:
        if getattr(head, name) is not None:
            setattr(head, name, Packed(getattr(head, name)))
    torch.testing.assert_close(head(hidden_states), expected[0])
    torch.testing.assert_close(head(hidden_states, targets), expected[1])


@pytest.mark.parametrize("shortlist_size", [None, 5])
def test_one_hidden_state_without_a_batch(shortlist_size: int | None) -> None:
    head = MoSLMHead(8, 50, num_mixtures=3, shortlist_size=shortlist_size)
    hidden_states = torch.randn(4, 8)
    for options in ({}, {"add_log_partition": True}):
        torch.testing.assert_close(head(hidden_states[2], **options), head(hidden_states, **options)[2])
    assert head(hidden_states[:0]).shape == (0, 50)
