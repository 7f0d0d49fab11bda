"""Checks the head alone: its outputs, its initialisation, and the decoders that it accepts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig

from hf_mos import MoSConfig, MoSLMHead

D, V, N = 12, 31, 10


def make_config(**options):
    backbone = LlamaConfig(vocab_size=V, hidden_size=D, num_attention_heads=2, tie_word_embeddings=False)
    return MoSConfig(text_config=backbone, **{"num_mixtures": 3, **options})


def make_head(decoder=None, **options):
    torch.manual_seed(0)
    return MoSLMHead(make_config(**options), decoder=decoder)


def trained(head):
    """Away from its initialisation, where all components are equal."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if not name.startswith("decoder"):
                parameter.add_(0.3 / head.latent_scale * torch.randn_like(parameter))
    return head


def inputs():
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(2, N // 2, D, generator=generator)
    targets = torch.randint(0, V, (2, N // 2), generator=generator)
    targets[0, :2] = -100
    return hidden_states, targets


def by_hand(head, hidden_states):
    """The paper's equation, in probability space and float64."""
    h = hidden_states.double()
    prior = F.softmax(F.linear(head.latent_scale * h, *weights(head.prior)), dim=-1)
    activation = torch.tanh if isinstance(head.activation, nn.Tanh) else (lambda x: x)
    if hasattr(head, "latent"):
        latents = activation(F.linear(h, *weights(head.latent))).unflatten(-1, (head.num_mixtures, -1))
    else:
        shifts = activation(F.linear(h, *weights(head.shift))).unflatten(-1, (head.num_mixtures, -1))
        shifts = shifts if head.latent_rank is None else shifts @ head.basis.double().T
        latents = h.unsqueeze(-2) + head.latent_scale * shifts
    logits = F.linear(latents, *weights(head.decoder))
    if head.shortlist_size is not None:
        shared = F.linear(latents.mean(-2), *weights(head.decoder))
        inside = torch.zeros_like(shared).scatter(-1, shared.topk(head.shortlist_size).indices, 1).unsqueeze(-2)
        logits = torch.where(inside > 0, logits, shared.unsqueeze(-2))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if head.shortlist_size is not None:
        prior = F.normalize(prior * logits.exp().sum(-1), p=1, dim=-1)
    return (prior.unsqueeze(-1) * F.softmax(logits, dim=-1)).sum(-2).log()


def weights(linear):
    return linear.weight.double(), None if linear.bias is None else linear.bias.double()


OPTIONS = [
    {},
    {"num_mixtures": 1},
    {"latent_activation": "tanh", "latent_bias": True, "prior_bias": True},
    {"latent_size": 7, "decoder_bias": True},
    {"softcap": 3.0},
    {"latent_rank": 4},
    {"shortlist_size": 5},
    {"shortlist_size": 5, "latent_rank": 4, "latent_bias": True, "softcap": 3.0, "decoder_bias": True},
    {"latent_rank": 4, "latent_activation": "tanh", "latent_bias": True, "softcap": 3.0, "decoder_bias": True},
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
def test_loss_is_the_log_probabilities(options, reduction):
    head = trained(make_head(**options)).double()
    hidden_states, targets = inputs()
    hidden_states = hidden_states.double()
    expected = F.nll_loss(head(hidden_states).flatten(0, 1), targets.flatten(), reduction=reduction)
    loss = head(hidden_states, targets=targets, reduction=reduction)
    torch.testing.assert_close(loss, expected.view(loss.shape))
    exact = torch.autograd.grad(expected.sum(), list(head.parameters()), allow_unused=True)
    given = torch.autograd.grad(loss.sum(), list(head.parameters()), allow_unused=True)
    for one, other in zip(given, exact, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options",
    [{}, {"latent_rank": 4}, {"latent_rank": 4, "latent_activation": "tanh"}, {"shortlist_size": 5}],
    ids=str,
)
def test_starts_as_one_softmax_and_parts_when_trained(options):
    head = make_head(**options)
    hidden_states, targets = inputs()
    softmax = F.log_softmax(head.decoder(hidden_states), dim=-1)
    torch.testing.assert_close(head(hidden_states), softmax, atol=1e-6, rtol=0)

    clones = copy.deepcopy(head)
    nn.init.zeros_(clones.prior.weight)
    for model, parts in ((head, True), (clones, False)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model.prior.weight], lr=1.0)
        for _ in range(5):
            optimizer.zero_grad()
            model(hidden_states, targets=targets).backward()
            optimizer.step()
        assert (model.latents(hidden_states).dense().std(dim=-2).max() > 1e-3) == parts


class Doubling(nn.Linear):
    """A decoder whose weight is not all that it computes, as an adapter's or a quantizer's is not."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_decoder_that_is_more_than_its_weight_is_called(rank, reduction):
    head = trained(make_head(decoder=Doubling(D, V), latent_rank=rank)).double()
    doubled = copy.deepcopy(head)
    doubled.decoder = nn.Linear(D, V, dtype=torch.float64)
    with torch.no_grad():
        doubled.decoder.weight.copy_(2 * head.decoder.weight)
        doubled.decoder.bias.copy_(2 * head.decoder.bias)
    hidden_states, targets = inputs()
    hidden_states = hidden_states.double()
    torch.testing.assert_close(head(hidden_states), doubled(hidden_states))
    loss = head(hidden_states, targets=targets, reduction=reduction, chunk_size=3)
    expected = doubled(hidden_states, targets=targets, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    for name in ("prior", "shift"):
        given = torch.autograd.grad(loss.sum(), getattr(head, name).weight, retain_graph=True)
        exact = torch.autograd.grad(expected.sum(), getattr(doubled, name).weight, retain_graph=True)
        torch.testing.assert_close(given, exact)


def test_the_prior_stays_wide_in_half_precision():
    head = make_head(decoder=nn.Linear(D, V, bias=False, dtype=torch.bfloat16))
    assert head.prior.weight.dtype == torch.float32
    assert head.shift.weight.dtype == torch.bfloat16
    hidden_states, targets = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.prior_logits(hidden_states).dtype == torch.float32
    assert head(hidden_states.bfloat16()).dtype == torch.float32
    head(hidden_states.bfloat16(), targets=targets).backward()
    assert head.decoder.weight.grad.dtype == torch.bfloat16


def test_dropout_acts_in_training_alone():
    head = trained(make_head(latent_dropout=0.5))
    hidden_states, _ = inputs()
    assert not torch.equal(head(hidden_states), head(hidden_states))
    head.eval()
    assert torch.equal(head(hidden_states), head(hidden_states))


def test_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"targets: expected \(2, 5\), given \(2, 4\)"):
        make_head()(inputs()[0], targets=torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("rank", [1, 4, D])
def test_the_basis_is_orthonormal_and_not_trained(rank):
    head = make_head(latent_rank=rank)
    torch.testing.assert_close(head.basis.T @ head.basis, torch.eye(rank))
    before, optimizer = head.basis.clone(), torch.optim.AdamW(head.parameters(), lr=0.1)
    hidden_states, targets = inputs()
    head(hidden_states, targets).backward()
    optimizer.step()
    assert head.shift.weight.abs().max() > 0
    assert torch.equal(head.basis, before)
