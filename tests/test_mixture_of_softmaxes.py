"""Checks the classifier with K softmax layers, and the readable maths that it shares with the language-model head."""

import pytest
import torch
import torch.nn.functional as F

from hf_mos import MixtureOfSoftmaxes, mos_log_probs


@pytest.mark.parametrize(("num_mixtures", "num_classes"), [(5, 10), (3, 10), (5, 10000)])
def test_the_documented_examples(num_mixtures, num_classes):
    mos = MixtureOfSoftmaxes(num_mixtures=num_mixtures, input_size=128, num_classes=num_classes)
    x = torch.randn(32, 128)
    output = mos(x)
    assert output.shape == torch.Size([32, num_classes])
    torch.testing.assert_close(output.sum(-1), torch.ones(32))


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 1, 3)])
def test_is_the_weighted_sum_of_its_softmaxes(leading):
    torch.manual_seed(0)
    mos = MixtureOfSoftmaxes(3, 8, 5).double()
    x = torch.randn(*leading, 8, dtype=torch.float64)
    probs, weights = mos(x, need_weights=True)
    assert weights.shape == (*leading, 3)
    torch.testing.assert_close(weights, F.softmax(mos.prior(x), dim=-1))
    expected = sum(weights[..., k, None] * F.softmax(layer(x), dim=-1) for k, layer in enumerate(mos.softmax_layers))
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(mos.log_prob(x), expected.log())
    assert torch.equal(mos(x), probs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss(reduction):
    torch.manual_seed(0)
    mos = MixtureOfSoftmaxes(3, 8, 5)
    x, targets = torch.randn(2, 4, 8), torch.randint(0, 5, (2, 4))
    targets[0, 0] = -100
    loss = mos.loss(x, targets, reduction=reduction)
    expected = F.nll_loss(mos.log_prob(x).flatten(0, 1), targets.flatten(), reduction=reduction)
    torch.testing.assert_close(loss, expected.view(loss.shape))
    ignored = mos.loss(x, torch.full_like(targets, -100))
    ignored.backward()
    assert ignored == 0
    assert not mos.prior.weight.grad.any()


def test_loss_of_one_input_without_a_batch():
    mos, x = MixtureOfSoftmaxes(3, 8, 5), torch.randn(8)
    for reduction in ("mean", "none"):
        torch.testing.assert_close(mos.loss(x, torch.tensor(2), reduction=reduction), -mos.log_prob(x)[2])


def test_a_classifier_learns():
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    targets = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()
    mos = MixtureOfSoftmaxes(4, 4, 4)
    optimizer = torch.optim.Adam(mos.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        mos.loss(x, targets).backward()
        optimizer.step()
    assert (mos(x).argmax(-1) == targets).float().mean() > 0.75  # one softmax cannot see the product: about 0.5


def test_a_probability_that_underflows_still_has_a_logarithm_and_a_gradient():
    mos = MixtureOfSoftmaxes(2, 1, 2)
    with torch.no_grad():
        for layer in mos.softmax_layers:
            layer.weight.copy_(torch.tensor([[200.0], [-200.0]]))
    x = torch.ones(1, 1)
    loss = mos.loss(x, torch.tensor([1]))
    loss.backward()
    assert mos(x)[0, 1] == 0
    assert loss > 350
    assert mos.softmax_layers[0].weight.grad.abs().max() > 0.1


@pytest.mark.parametrize("argument", ["num_mixtures", "input_size", "num_classes"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True])
def test_sizes_are_checked(argument, value):
    sizes = {"num_mixtures": 2, "input_size": 3, "num_classes": 4, argument: value}
    with pytest.raises(ValueError, match=f"{argument}: expected an int of at least 1"):
        MixtureOfSoftmaxes(**sizes)


def test_other_widths_and_shapes_are_refused():
    mos = MixtureOfSoftmaxes(2, 3, 4)
    with pytest.raises(ValueError, match=r"x: expected \(..., 3\), given \(5, 2\)"):
        mos(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"targets: expected \(5,\), given \(4,\)"):
        mos.loss(torch.zeros(5, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="reduction: expected"):
        mos.loss(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long), reduction="average")


def test_reference_log_probabilities():
    torch.manual_seed(0)
    latents, prior_logits = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 3, 4).double()
    weight, bias = torch.randn(9, 6).double(), torch.randn(9).double()
    component_probs = F.softmax(2 * torch.tanh((latents @ weight.T + bias) / 2), dim=-1)
    expected = (F.softmax(prior_logits, dim=-1).unsqueeze(-1) * component_probs).sum(-2).log()
    given = mos_log_probs(latents, prior_logits, weight, decoder_bias=bias, softcap=2.0)
    torch.testing.assert_close(given, expected)
