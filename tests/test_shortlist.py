"""Components that differ on a shortlist: what is particular to them. The tests of both heads run over them too."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB_SIZE, chunks_of, log_prob_gap, random_tokens, tiny_causal_lm, tiny_mos
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from hf_mos import MoSConfig, MoSForCausalLM, MoSLMHead, mos_cross_entropy, mos_log_probs
from hf_mos.remote_code import mos_head
from hf_mos.remote_code.mos_log_probs import infer_log_probs
from hf_mos.remote_code.mos_shortlist import GROUP, top_classes
from hf_mos.training.mixture_statistics import mixture_statistics, predict_in_chunks

N, K, D = 9, 3, 12


def draw(V: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean latents, offsets whose mean is zero, the prior's logits and the decoder's weight."""
    generator = torch.Generator().manual_seed(V)
    shapes = ((N, D), (N, K, D), (N, K), (V, D))
    mean, offsets, prior_logits, weight = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return scale * mean, offsets - offsets.mean(1, keepdim=True), prior_logits, weight


def whole(mean: Tensor, offsets: Tensor) -> Tensor:
    """The latents (N, K, D)."""
    return mean.unsqueeze(1) + offsets


MANY = 4103  # classes, so many that groups of them are searched for N tokens


@pytest.mark.parametrize("V", [1, GROUP - 1, GROUP, 320, MANY, 2**15 + 7])
@pytest.mark.parametrize("count", [1, 3, 10, 64, 10**6])
def test_top_classes_are_those_of_topk(V: int, count: int) -> None:
    for leading in ((1,), (4,), (2, 3), (65,)):
        logits = torch.randn(*leading, V)
        chosen, classes = top_classes(logits, count)
        assert torch.equal(chosen, logits.gather(-1, classes))
        assert torch.equal(chosen.sort(-1).values, logits.topk(min(count, V)).values.sort(-1).values)


@pytest.mark.parametrize("value", [0.0, float("-inf")])
def test_top_classes_of_ties_are_distinct(value: float) -> None:
    logits = torch.full((3, 2**15 + 5), value)
    for count in (1, 4, 9, 100):
        assert all(len(row.unique()) == count for row in top_classes(logits, count)[1])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("size", [1, 4, 20])
def test_is_the_mixture_of_components_that_share_their_tails(size: int, softcap: float | None) -> None:
    """By the definition, component by component, in probability space."""
    mean, offsets, prior_logits, weight = draw(MANY)
    shared = mean @ weight.T
    inside = torch.zeros_like(shared).scatter(1, shared.topk(size).indices, 1).unsqueeze(1)
    logits = shared.unsqueeze(1) + inside * (offsets @ weight.T)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    partition = logits.exp().sum(-1)  # (N, K)
    mixture_weights = F.normalize(prior_logits.softmax(-1) * partition, p=1, dim=-1)
    expected = (mixture_weights.unsqueeze(-1) * logits.softmax(-1)).sum(1).log()
    options = {"softcap": softcap, "shortlist_size": size}
    torch.testing.assert_close(mos_log_probs(whole(mean, offsets), prior_logits, weight, **options), expected)
    for latents in ((mean, offsets), whole(mean, offsets)):
        torch.testing.assert_close(infer_log_probs(latents, prior_logits, weight, **options), expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_with_its_log_partition_it_is_the_logits_of_one_softmax(softcap: float | None) -> None:
    mean, offsets, prior_logits, weight = draw(MANY)
    options: dict[str, Any] = {"shortlist_size": 9, "softcap": softcap, "add_log_partition": True}
    given = infer_log_probs((mean, offsets), prior_logits, weight, **options)
    torch.testing.assert_close(given, mos_log_probs((mean, offsets), prior_logits, weight, **options))
    shared = mean @ weight.T
    shared = shared if softcap is None else softcap * torch.tanh(shared / softcap)
    outside = torch.ones_like(shared).scatter(1, (mean @ weight.T).topk(9).indices, 0).bool()
    torch.testing.assert_close(given[outside], shared[outside])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_few_tokens_and_many_are_predicted_alike(
    bias: bool, softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that is decoded, by few operations, and a prompt, by those in place."""
    head = MoSLMHead(D, MANY, bias=bias, dtype=dtype, num_mixtures=K, shortlist_size=6, softcap=softcap)
    nn.init.normal_(head.shift.weight, std=0.3 / head.latent_scale)
    if bias:
        head.bias[:7] = -torch.inf  # classes that are never predicted
    hidden_states = torch.randn(2, 3, D, dtype=dtype)
    for options in ({}, {"add_log_partition": True}):
        few = head(hidden_states, **options)
        with monkeypatch.context() as patch:
            patch.setattr(mos_head, "ROW_BYTES", 0)
            many = head(hidden_states, **options)
        assert few.dtype == many.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(few, many)
        one_by_one = [head(hidden_states[:, position], **options) for position in range(3)]
        torch.testing.assert_close(
            torch.stack(one_by_one, dim=1), few, rtol=0.05, atol=0.1 if dtype.itemsize == 2 else 1e-5
        )


@pytest.mark.parametrize("more", [0, 1])
def test_a_shortlist_of_all_classes_is_the_full_mixture(more: int) -> None:
    mean, offsets, prior_logits, weight = draw(70)
    latents = whole(mean, offsets)
    log_gate_and_partition = prior_logits.log_softmax(-1) + torch.logsumexp(latents @ weight.T, dim=-1)
    full = mos_log_probs(latents, log_gate_and_partition, weight)
    given = infer_log_probs((mean, offsets), prior_logits, weight, shortlist_size=70 + more)
    torch.testing.assert_close(given, full)
    targets = torch.arange(N)
    loss = mos_cross_entropy((mean, offsets), prior_logits, weight, targets, shortlist_size=70 + more)
    torch.testing.assert_close(loss, F.nll_loss(full, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_losses_of_all_labels_are_one_distribution(dtype: torch.dtype) -> None:
    """The label has no part in the choice of the shortlist."""
    V = MANY
    mean, offsets, prior_logits, weight = draw(V, dtype)
    part = slice(0, 2)
    latents = (mean[part].repeat(V, 1), offsets[part].repeat(V, 1, 1))
    targets = torch.arange(V).repeat_interleave(2)
    options: dict[str, Any] = {"shortlist_size": 5, "reduction": "none"}
    nll = mos_cross_entropy(latents, prior_logits[part].repeat(V, 1), weight, targets, **options)
    torch.testing.assert_close((-nll).exp().view(V, 2).sum(0), torch.ones(2, dtype=dtype))


def test_a_confident_token_whose_shortlist_holds_all_the_mass() -> None:
    mean, offsets, prior_logits, weight = draw(MANY, torch.float32, scale=60.0)
    leaves = [x.requires_grad_() for x in (mean, offsets, prior_logits, weight)]
    targets = torch.arange(N)
    loss = mos_cross_entropy((mean, offsets), prior_logits, weight, targets, shortlist_size=4)
    given = torch.autograd.grad(loss, leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    offsets = wide[1] - wide[1].mean(1, keepdim=True)
    exact = F.nll_loss(mos_log_probs(whole(wide[0], offsets), wide[2], wide[3], shortlist_size=4), targets)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    for one, other in zip(given, torch.autograd.grad(exact, wide), strict=True):
        assert one.isfinite().all()
        one = one - one.mean(1, keepdim=True) if one.dim() == 3 else one  # of offsets whose mean is zero
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_groups_of_classes_and_chunks_of_tokens(reduction: str, softcap: float | None) -> None:
    leaves = [x.clone().requires_grad_() for x in draw(MANY)]
    mean, offsets, prior_logits, weight = leaves
    offsets = offsets - offsets.mean(1, keepdim=True)
    targets = torch.randint(0, MANY, (N,))
    targets[::4] = -100
    options: dict[str, Any] = {"softcap": softcap, "shortlist_size": 6}
    log_probs = mos_log_probs(whole(mean, offsets), prior_logits, weight, **options)
    expected = F.nll_loss(log_probs, targets, reduction=reduction)
    with chunks_of(2):
        given = mos_cross_entropy((mean, offsets), prior_logits, weight, targets, reduction=reduction, **options)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    pairs = (torch.autograd.grad(loss.sum(), leaves, retain_graph=True) for loss in (given, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_logits_with_gradients_are_those_of_one_softmax(name: str) -> None:
    """Values and gradients of the readable maths, without a tensor as wide as K vocabularies."""
    model = tiny_mos(name, num_mixtures=K, shortlist_size=4).double()
    head, tokens = model.lm_head, random_tokens(2)
    hidden, targets = torch.randn(64, head.in_features, dtype=torch.float64), torch.arange(64)
    with Largest() as largest:
        log_probs = head(hidden)
    assert largest.numbers < 64 * K * VOCAB_SIZE
    options: dict[str, Any] = {"decoder_bias": head.bias, "softcap": head.softcap, "shortlist_size": 4}
    expected = mos_log_probs(head.latents(hidden), head.prior_logits(hidden), head.weight, **options)
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=1e-12)
    weights = [head.shift.weight, head.prior.weight, head.weight]
    gradients = (torch.autograd.grad(F.nll_loss(found, targets), weights) for found in (log_probs, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    logits = model(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-10, atol=1e-10)


def test_fewer_possible_classes_than_the_shortlist_has() -> None:
    """Classes at -inf are in the shortlist then; the loss and its gradients are those without these classes."""
    mean, offsets, prior_logits, weight = draw(300)
    live = 7
    bias = torch.zeros(300, dtype=torch.float64)
    bias[live:] = float("-inf")
    gradients = []
    for classes, decoder_bias in ((300, bias), (live, None)):
        leaves = [x.clone().requires_grad_() for x in (mean, offsets, prior_logits, weight[:classes])]
        *pair, prior, rows = leaves
        options: dict[str, Any] = {"decoder_bias": decoder_bias, "shortlist_size": 20}
        loss = mos_cross_entropy(tuple(pair), prior, rows, torch.arange(N) % live, **options)
        *others, d_rows = torch.autograd.grad(loss, leaves)
        gradients.append([loss.detach(), *others, d_rows[:live]])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gpt2"])
def test_exact_at_step_0(dtype: torch.dtype, name: str) -> None:
    softmax = tiny_causal_lm(name).to(dtype)
    model = MoSForCausalLM.from_causal_lm(copy.deepcopy(softmax), num_mixtures=4, shortlist_size=5)
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    assert log_prob_gap(model, softmax, input_ids=random_tokens()) < bound


def test_one_component_is_one_softmax_of_its_latent() -> None:
    """The mean of the latents reaches every class, not the shortlist alone."""
    hidden, targets = torch.randn(6, 32, dtype=torch.float64), torch.arange(6)
    losses, gradients = [], []
    for size in (None, 5):
        torch.manual_seed(0)
        head = tiny_mos(num_mixtures=1, shortlist_size=size).double().lm_head
        torch.nn.init.normal_(head.shift.weight)
        losses.append(head(hidden, targets))
        losses[-1].backward()
        gradients.append(head.shift.weight.grad)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_mixture_weights_are_the_mixtures_own() -> None:
    model = tiny_mos(shortlist_size=5).double()
    head, hidden = model.lm_head, torch.randn(6, 32, dtype=torch.float64)
    with torch.no_grad():
        _, predictions = next(predict_in_chunks(head, hidden))
        torch.testing.assert_close(predictions.log_probs(), head(hidden))
        torch.testing.assert_close(predictions.log_weights.exp().sum(-1), torch.ones(6, dtype=torch.float64))
        assert not torch.allclose(predictions.log_weights, head.prior_logits(hidden).log_softmax(-1))
        statistics = mixture_statistics(head, hidden, torch.arange(6))
    torch.testing.assert_close(statistics.mean_weights, predictions.log_weights.exp().mean(0))


def test_trains_and_its_components_part(tmp_path: Any) -> None:
    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(), num_mixtures=3, shortlist_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, losses = random_tokens(8), []
    for _ in range(20):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert model.lm_head.shift.weight.view(3, -1).std(0).max() > 1e-3
    model.save_pretrained(tmp_path)
    reloaded = MoSForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.shortlist_size == 8
    assert log_prob_gap(model.eval(), reloaded, input_ids=tokens) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shortlist_size": 0}, "shortlist_size: expected an int of at least 1, or None, given 0"),
        ({"shortlist_size": 2.5}, "shortlist_size: expected an int of at least 1, or None, given 2.5"),
        ({"shortlist_size": True}, "shortlist_size: expected an int of at least 1, or None, given True"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        MoSConfig.from_backbone_config(LlamaConfig(vocab_size=VOCAB_SIZE), **options)
