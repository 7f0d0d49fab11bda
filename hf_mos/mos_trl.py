"""The answer to TRL's trainers, which replace a model's `forward` by the backbone and one softmax.

TRL's `add_fused_lm_head` assigns such a forward, and the trainers then call it with `fused_lm_head=True`. A mixture
keeps its own forward, remembers the options of TRL's, and answers the call with its token scores.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .mos_backbone import add_aux_loss
from .mos_head import MoSLMHead
from .mos_log_probs import count_items
from .mos_token_scores import SCORES, ScoreOptions, TokenScores


class FusedHeadMixin(nn.Module):
    """A part of [`MoSForCausalLM`]: keeps its forward from TRL, and computes the scores that TRL asks for."""

    backbone: PreTrainedModel
    lm_head: MoSLMHead
    score_options = ScoreOptions()

    def __setattr__(self, name: str, value: Any) -> None:
        """Equivalent to: `nn.Module.__setattr__`, but a forward of TRL's leaves its options and is not assigned.

        Raises:
            ValueError: a trainer of TRL is about to multiply the last hidden states by the decoder's weight.
        """
        if name == "forward" and "_ForwardRedirection" in getattr(value, "__qualname__", ""):
            raise ValueError(
                "model: expected one softmax with this trainer of TRL, whose loss is made of the last hidden states "
                "and the weight of the output embeddings, given a mixture, of which it would train a part. Make the "
                "loss of outputs.logits instead."
            )
        function = getattr(value, "__func__", None)
        if name == "forward" and function is not None and "fused_lm_head" in function.__code__.co_varnames:
            self.score_options = read_score_options(function, self.lm_head)
        else:
            super().__setattr__(name, value)

    def token_scores(
        self, hidden_states: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None, aux_loss: Tensor | None
    ) -> TokenScores:
        """Computes the scores of the targets (batch, sequence) that are not -100."""
        targets = targets.to(hidden_states.device)
        counts = targets != -100
        flat = self.lm_head(hidden_states[counts], targets=targets[counts], scores=self.score_options)
        # masked_scatter stays differentiable where no label counts
        scores: dict[str, Any] = {
            name: None if part is None else part.new_zeros(counts.shape).masked_scatter(counts, part)
            for name, part in zip(SCORES, flat, strict=True)
        }
        loss = -scores["log_probs"].sum() / count_items(targets, num_items_in_batch)
        loss = add_aux_loss(loss, aux_loss, self.backbone)
        return TokenScores(loss=loss, label_mask=counts, aux_loss=aux_loss, **scores)


def read_score_options(function: Any, head: MoSLMHead) -> ScoreOptions:
    """Reads the options given to TRL's `add_fused_lm_head` from the closure of the function that it made."""
    if head.balance_coefficient:
        raise ValueError(
            "balance_coefficient: expected 0 with a trainer of TRL, which makes its loss of the log-probabilities "
            f"alone, given {head.balance_coefficient}. Load the model with balance_coefficient=0.0."
        )
    given = inspect.getclosurevars(function).nonlocals
    if not {"temperature", "outputs"} <= given.keys() or not set(given["outputs"]) <= set(SCORES):
        raise ValueError(
            f"forward: expected the fused head of TRL 1.16, whose options are temperature and outputs of {SCORES}, "
            f"given one with {sorted(given)} and {given.get('outputs')}. Install 'trl>=1.16,<1.17'."
        )
    return ScoreOptions(float(given["temperature"]), tuple(given["outputs"]))
