"""Checks examples/softmax_bottleneck/paper_head.py: a subclass of MoSLMHead is trained by the loss of the library."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_causal_lm

from hf_mos import MoSForCausalLM

SCRIPTS = Path(__file__).parents[1] / "examples" / "softmax_bottleneck"


@pytest.fixture
def model(monkeypatch):
    """A model with the paper's head of three components, in float64."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from paper_head import PaperHead

    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(), shortlist_size=None).double()
    head = PaperHead.take_over(model.mos_head, num_mixtures=3, shortlist_size=None, latent_scale=1.0)
    assert model.lm_head is head
    return model


def loss_of_the_paper(head, hidden_states, labels):
    """Section 2.3 of the paper, over all classes at once."""
    latents = torch.tanh(hidden_states @ head.shift.weight.T).unflatten(-1, (3, -1))
    latents = F.dropout(latents, head.dropout, head.training)
    component_log_probs = (latents @ head.weight.T).log_softmax(-1)
    log_weights = (hidden_states @ head.prior.weight.T).log_softmax(-1)
    log_probs = (log_weights.unsqueeze(-1) + component_log_probs).logsumexp(-2)
    return F.nll_loss(log_probs[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 2), (3, 7)])
def test_loss_and_gradients_are_those_of_plain_autograd(model, shape, dropout):
    model.lm_head.dropout = dropout
    input_ids = torch.randint(model.config.vocab_size, shape)
    labels = input_ids.masked_fill(torch.rand(shape) < 0.3, -100)
    labels[0, 1] = input_ids[0, 1]  # one label at least
    found = []
    for compute in (
        lambda: model(input_ids=input_ids, labels=labels).loss,
        lambda: loss_of_the_paper(model.lm_head, model.head_inputs(input_ids=input_ids), labels),
    ):
        model.train().zero_grad()
        torch.manual_seed(0)  # of dropout
        loss = compute()
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        found.append({"loss": loss.detach(), **gradients})
    assert all(found[1][f"lm_head.{name}"].abs().sum() > 0 for name in ("weight", "prior.weight", "shift.weight"))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_its_model_is_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match="PaperHead"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()
