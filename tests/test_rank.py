"""Checks the rank of the log-probability matrix: bounded for one softmax, not bounded for a mixture."""

import pytest
import torch
from helpers import HEADS, VOCAB_SIZE, random_tokens, tiny_causal_lm, tiny_mos
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mos import MoSForCausalLM
from hf_mos.tools.rank import log_prob_matrix, log_prob_rank

HIDDEN_SIZE = 32


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mamba", "mixtral"])
def test_one_softmax_reaches_its_bound_and_no_more(name):
    log_probs = log_prob_matrix(tiny_causal_lm(name), random_tokens(8, 16))
    assert log_probs.shape == (128, VOCAB_SIZE)
    assert log_prob_rank(log_probs).rank == HIDDEN_SIZE + 1


@pytest.mark.parametrize("head", HEADS)
def test_a_mixture_reaches_the_vocabulary(head):
    log_probs = log_prob_matrix(tiny_mos(**head), random_tokens(8, 16))
    assert log_prob_rank(log_probs).rank == VOCAB_SIZE


def test_a_mixture_that_was_not_trained_has_the_rank_of_its_softmax():
    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(), num_mixtures=3)
    assert log_prob_rank(log_prob_matrix(model, random_tokens(8, 16))).rank == HIDDEN_SIZE + 1


def test_a_softcap_lifts_the_bound_by_itself():
    log_probs = log_prob_matrix(tiny_causal_lm("gemma2"), random_tokens(8, 16))
    assert log_prob_rank(log_probs).rank > HIDDEN_SIZE + 1


def test_the_matrix_is_what_the_model_predicts():
    model, tokens = tiny_mos(), random_tokens(3, 10)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits.flatten(0, 1)
    log_probs = log_prob_matrix(model, tokens, max_contexts=25)
    torch.testing.assert_close(log_probs.float(), expected[:25], rtol=1e-4, atol=1e-4)
    assert log_probs.dtype == torch.float64
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(25, dtype=torch.float64))


def test_the_model_stays_as_it_was():
    model, tokens = tiny_causal_lm("gpt2").train(), random_tokens()
    log_prob_matrix(model, tokens)
    assert model.training
    assert model(input_ids=tokens).logits.dtype == torch.float32


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31))
def test_the_rank_of_a_product_is_its_inner_size(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (40, 15))
    result = log_prob_rank(left @ right.T)
    assert result.rank == rank == torch.linalg.matrix_rank(left @ right.T)
    assert result.singular_values.shape == (15,)
    assert result.at(0.999) == 1


@pytest.mark.parametrize(
    ("log_probs", "tolerance", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), None, r"expected \(N, V\), given \(3,\)"),
        (torch.zeros(3, 4), None, "expected torch.float64, or a tolerance"),
        (torch.zeros(3, 4), 2.0, r"expected a number in \[0, 1\)"),
        (torch.full((3, 4), -torch.inf, dtype=torch.float64), None, "expected finite numbers"),
    ],
)
def test_what_has_no_rank_is_refused(log_probs, tolerance, message):
    with pytest.raises(ValueError, match=message):
        log_prob_rank(log_probs, tolerance)
