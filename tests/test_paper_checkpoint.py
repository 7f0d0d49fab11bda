"""Checks that a head loaded from a checkpoint of the paper's code computes the paper's equations."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

SCRIPTS = Path(__file__).parents[1] / "examples" / "softmax_bottleneck"


@pytest.fixture(scope="module")
def load_paper_head():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        from paper_checkpoint import load_paper_head

        yield load_paper_head


class OriginalHead(nn.Module):
    """The paper's equations, section 2.3, with the module names of its code; in probability space, as there."""

    def __init__(self, num_mixtures=3, input_size=10, latent_size=6, num_classes=17):
        super().__init__()
        self.num_mixtures, self.num_classes = num_mixtures, num_classes
        self.prior = nn.Linear(input_size, num_mixtures, bias=False)
        self.latent = nn.Sequential(nn.Linear(input_size, num_mixtures * latent_size), nn.Tanh())
        self.decoder = nn.Linear(latent_size, num_classes)

    def forward(self, hidden_states):
        latents = self.latent(hidden_states).view(-1, self.decoder.in_features)
        component_probs = self.decoder(latents).softmax(-1).view(-1, self.num_mixtures, self.num_classes)
        mixture_weights = self.prior(hidden_states).softmax(-1)
        return (component_probs * mixture_weights.unsqueeze(2)).sum(1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(2, 20))
def test_a_head_predicts_what_the_paper_says(load_paper_head, num_mixtures, input_size, latent_size, num_classes):
    original = OriginalHead(num_mixtures, input_size, latent_size, num_classes).double()
    head = load_paper_head(original.state_dict())
    hidden_states = 2 * torch.randn(7, input_size, dtype=torch.float64)
    torch.testing.assert_close(head(hidden_states), original(hidden_states).log(), rtol=1e-12, atol=1e-12)


def test_its_loss_and_gradients_are_those_of_the_paper(load_paper_head):
    original = OriginalHead().double()
    head = load_paper_head(original.state_dict())
    hidden_states, targets = torch.randn(9, 10, dtype=torch.float64), torch.randint(17, (9,))
    nn.functional.nll_loss(original(hidden_states).log(), targets).backward()
    head(hidden_states, targets=targets).backward()
    pairs = {
        "prior.weight": "prior.weight",
        "latent.0.weight": "shift.weight",
        "latent.0.bias": "shift.bias",
        "decoder.weight": "weight",
        "decoder.bias": "bias",
    }
    theirs, ours = dict(original.named_parameters()), dict(head.named_parameters())
    assert (pairs.keys(), {*pairs.values()}) == (theirs.keys(), ours.keys())
    for their_name, our_name in pairs.items():
        torch.testing.assert_close(ours[our_name].grad, theirs[their_name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_from_a_file_with_the_rest_of_the_model(load_paper_head, tmp_path, suffix):
    original = OriginalHead()
    tensors = {f"module.{name}": tensor for name, tensor in original.state_dict().items()}
    tensors["module.encoder.weight"] = torch.zeros(17, 6)
    path = tmp_path / f"model{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    head = load_paper_head(path, prefix="module.", dropout=0.3)
    hidden_states = torch.randn(4, 10)
    torch.testing.assert_close(head(hidden_states), original(hidden_states).log(), rtol=1e-4, atol=1e-5)
    assert head.dropout == 0.3
    assert not head.training


def test_a_pickled_model_is_not_run(load_paper_head, tmp_path):
    torch.save(OriginalHead(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="expected a state dict, given a pickle of other objects"):
        load_paper_head(tmp_path / "model.pt")


def test_a_missing_tensor_is_named(load_paper_head):
    tensors = OriginalHead().state_dict()
    del tensors["latent.0.bias"]
    with pytest.raises(ValueError, match=r"expected \['latent.0.bias'\], given \['decoder.bias', "):
        load_paper_head(tensors)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("latent.0.weight", (17, 10), r"latent.0.weight: expected \(18, 10\) beside a prior of \(3, 10\)"),
        ("decoder.bias", (16,), r"decoder.bias: expected \(17,\)"),
        ("prior.weight", (3,), r"prior.weight: expected 2 dimensions, given \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(load_paper_head, name, shape, message):
    with pytest.raises(ValueError, match=message):
        load_paper_head(OriginalHead().state_dict() | {name: torch.zeros(shape)})
