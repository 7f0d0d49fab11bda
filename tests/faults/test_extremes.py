"""Checks extreme values: the results are finite and agree with float64, or an error names the problem."""

import pytest
import torch
from helpers import HEADS, VOCAB_SIZE, random_tokens, tiny_causal_lm, tiny_mos

from hf_mos import mos_cross_entropy, mos_log_probs

HALF = [torch.float16, torch.bfloat16]
N, K, D, V = 6, 3, 16, 41


def tensors(dtype: torch.dtype, latent_scale: float = 1.0, prior_scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Latents (N, K, D), prior logits (N, K) in fp32, decoder weight (V, D) and targets (N,)."""
    latents = (latent_scale * torch.randn(N, K, D)).to(dtype)
    prior = prior_scale * torch.randn(N, K)
    weight = (torch.randn(V, D) * D**-0.5).to(dtype)
    return latents, prior, weight, torch.randint(0, V, (N,))


def loss_and_gradients(*inputs: torch.Tensor, exact: bool = False) -> list[torch.Tensor]:
    *floats, targets = inputs
    leaves = [(x.double() if exact else x.clone()).requires_grad_() for x in floats]
    if exact:
        loss = torch.nn.functional.nll_loss(mos_log_probs(*leaves), targets)
    else:
        loss = mos_cross_entropy(*leaves, targets)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(("latent_scale", "prior_scale"), [(1e4, 1.0), (1.0, 1e4), (1e4, 1e4), (1e-7, 1.0)])
def test_large_hidden_states_and_a_saturated_prior(
    dtype: torch.dtype, latent_scale: float, prior_scale: float
) -> None:
    """The inputs are rounded before both; what is left is the rounding of the products."""
    inputs = tensors(dtype, min(latent_scale, 1e4), prior_scale)
    inputs = (inputs[0].clamp(-6e4, 6e4), *inputs[1:])
    ours, exact = loss_and_gradients(*inputs), loss_and_gradients(*inputs, exact=True)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-4}[dtype]
    for mine, true in zip(ours, exact, strict=True):
        assert mine.isfinite().all()
        assert (mine.double() - true).norm() <= tolerance * true.norm() + tolerance


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_a_model_whose_hidden_states_are_large(dtype: torch.dtype, options: dict) -> None:
    head = tiny_mos(**options).lm_head.to(dtype)
    head.prior.float()
    # Of a seed whose logits fp16 can hold: the largest is 64,853.
    hidden = 1e4 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)).clamp(-5, 5)
    hidden = hidden.to(dtype)
    targets = random_tokens(2, 5)
    exact = tiny_mos(**options).lm_head.to(dtype).double()
    exact.prior.load_state_dict(head.prior.state_dict())
    with torch.no_grad():
        log_probs, loss = head(hidden), head(hidden, targets=targets)
        true = exact(hidden.double(), targets=targets)
    assert log_probs.isfinite().all()
    assert log_probs.exp().sum(-1).sub(1).abs().max() < 1e-4
    assert (loss.double() - true).abs() < 2e-2 * true


def test_a_batch_without_tokens() -> None:
    latents, prior, weight, targets = (x[:0] if len(x) == N else x for x in tensors(torch.float32))
    loss, *gradients = loss_and_gradients(latents, prior, weight, targets)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients)
    for options in HEADS:
        with torch.no_grad():
            assert tiny_mos(**options).lm_head(torch.zeros(0, 3, 32)).shape == (0, 3, VOCAB_SIZE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_token_sequences_and_labels_that_are_all_ignored(name: str) -> None:
    model = tiny_mos(name).train()
    for tokens, labels in (
        (random_tokens(2, 1), random_tokens(2, 1)),
        (random_tokens(2, 6), torch.full((2, 6), -100)),
    ):
        model.zero_grad()
        loss = model(tokens, labels=labels).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.eval()(random_tokens(2, 1)).logits.exp().sum(-1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("bad", [VOCAB_SIZE, -1, -99, 10**6])
def test_labels_out_of_range(bad: int) -> None:
    model = tiny_mos().train()
    labels = random_tokens(2, 6)
    labels[1, 3] = bad
    with pytest.raises(ValueError, match=f"targets: expected class indices below {VOCAB_SIZE}, or -100, given {bad}"):
        model(random_tokens(2, 6), labels=labels)


def test_a_prior_that_saturates_wholly() -> None:
    latents, _, weight, targets = tensors(torch.float32)
    prior = torch.full((N, K), -torch.inf)
    prior[:, 1] = 0.0
    softmax = torch.nn.functional.cross_entropy(latents[:, 1] @ weight.T, targets)
    ours = loss_and_gradients(latents, prior, weight, targets)
    assert torch.allclose(ours[0], softmax)
    assert all(gradient.isfinite().all() for gradient in ours)


def test_vocabulary_entries_at_minus_infinity() -> None:
    """Entries that every component masks have no probability, and the others' gradients are finite."""
    latents, prior, weight, _ = tensors(torch.float32)
    bias = torch.zeros(V)
    bias[30:] = -torch.inf
    targets = torch.randint(0, 30, (N,))
    leaves = [x.requires_grad_() for x in (latents, prior, weight)]
    loss = mos_cross_entropy(*leaves, targets, decoder_bias=bias)
    loss.backward()
    kept = torch.nn.functional.nll_loss(mos_log_probs(*(x.double() for x in (latents, prior, weight[:30]))), targets)
    assert loss.isfinite()
    assert (loss.double() - kept).abs() < 1e-5
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not leaves[2].grad[30:].any()


def test_sharp_components_do_not_underflow() -> None:
    latents, prior, weight, targets = tensors(torch.float32)
    ours = mos_cross_entropy(300 * latents, prior, weight, targets)
    exact = torch.nn.functional.nll_loss(mos_log_probs((300 * latents).double(), prior, weight.double()), targets)
    assert exact > 100  # probabilities below 1e-43
    assert (ours.double() - exact).abs() < 1e-4 * exact


def test_tokens_out_of_range_are_the_backbones_error() -> None:
    tokens = torch.tensor([[VOCAB_SIZE]])
    for model in (tiny_causal_lm(), tiny_mos()):
        with pytest.raises(IndexError, match="out of range"):
            model(tokens)
