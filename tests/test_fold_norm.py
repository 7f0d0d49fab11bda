"""A final norm that is folded into the head changes no prediction of a trained mixture, nor its training."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import log_prob_gap, random_tokens, tiny_causal_lm, tiny_mos

from hf_mos import MoSForCausalLM
from hf_mos.tools.fold_norm import fold_final_norm

TOKENS = random_tokens()
HEADS = [
    {"shortlist_size": None},
    {"shortlist_size": 20},
    {"shortlist_size": None, "shift_rank": 4},
    {"shortlist_size": 20, "shift_rank": 4},
]
# A plain gain, one plus the weight and a softcap, a bias, a decoder with one, a scale after the norm, no attention.
NAMES = ["llama", "gemma2", "gpt2", "gpt_neox", "bert", "cohere", "mamba"]


def trained(name: str, **options: Any) -> MoSForCausalLM:
    """A mixture with a gain, a bias and shifts, as training leaves them."""
    model = tiny_mos(name, tie_word_embeddings=False, **options)
    generator = torch.Generator().manual_seed(0)
    norms = {key: weight for key, weight in model.named_parameters() if weight.dim() == 1}
    with torch.no_grad():
        for weight in norms.values():
            weight += 0.5 * torch.rand(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    ("name", "options"), [*itertools.product(NAMES, HEADS[:1] + HEADS[3:]), *(("llama", head) for head in HEADS[1:3])]
)
def test_a_folded_norm_changes_no_prediction(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(name, **options)
    folded = copy.deepcopy(model)
    norm: Any = fold_final_norm(folded)
    assert norm.weight.unique().tolist() == [0.0 if name == "gemma2" else 1.0]
    assert not torch.allclose(folded.head_inputs(TOKENS), model.head_inputs(TOKENS), rtol=0.01)
    assert log_prob_gap(folded, model, input_ids=TOKENS) < 1e-5
    with torch.no_grad():
        losses = [each(TOKENS, labels=TOKENS).loss for each in (folded, model)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    folded.save_pretrained(tmp_path)
    assert log_prob_gap(MoSForCausalLM.from_pretrained(tmp_path), model, input_ids=TOKENS) < 1e-5

    # A tool for softmax models folds it into the decoder alone.
    for name_of_layer in ("prior", "shift", "widening"):
        if (layer := getattr(folded.mos_head, name_of_layer)) is not None:
            layer.load_state_dict(getattr(model.mos_head, name_of_layer).state_dict())
    assert log_prob_gap(folded, model, input_ids=TOKENS) > 0.1


@pytest.mark.parametrize("options", [HEADS[0], HEADS[2]], ids=str)  # on a shortlist rounding chooses other classes
def test_half_precision(options: dict[str, Any]) -> None:
    model = trained("llama", **options).to(torch.bfloat16)
    folded = copy.deepcopy(model)
    fold_final_norm(folded)
    exact = [copy.deepcopy(each).float() for each in (model, folded)]
    assert log_prob_gap(*exact, input_ids=TOKENS) < 0.2  # of logits up to 20, by the rounding of weights


def test_what_cannot_be_folded_is_refused_and_left_as_it_was() -> None:
    def zero_gain(model: Any) -> None:
        model.model.norm.weight.data[3] = 0

    def other_norm(model: Any) -> None:
        model.model.norm.register_forward_hook(lambda module, inputs, output: output.tanh())

    def own_shift(model: Any) -> None:
        model.lm_head.shift = torch.nn.Sequential(model.lm_head.shift)

    refused: list[tuple[Any, str]] = [
        (zero_gain, "expected a final norm with a gain without zeros"),
        (other_norm, "expected a final norm with a gain without zeros"),
        (own_shift, "expected a mixture whose head has plain layers"),
    ]
    for change, message in refused:
        model = trained("llama")
        change(model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"model: {message}"):
            fold_final_norm(model)
        assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    with pytest.raises(ValueError, match="tie_word_embeddings: expected False"):
        fold_final_norm(tiny_mos("llama-tied"))
    with pytest.raises(ValueError, match="model: expected a mixture whose head has plain layers, given Linear"):
        fold_final_norm(tiny_causal_lm())
