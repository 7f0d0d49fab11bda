"""The head of the paper: latents with `tanh` and dropout, without the hidden state itself. A control of the studies.

    model = MoSForCausalLM.from_causal_lm(softmax_model, shortlist_size=None)
    PaperHead.take_over(model.mos_head, num_mixtures=4, shortlist_size=None, latent_scale=1.0)

Predictions change until it is trained, and it is trained by the loss of every `MoSLMHead`. `save_pretrained` refuses a
model with it, as its class does not travel with the weights; save its `state_dict()` instead.

Source: Yang et al. 2018, arXiv 1711.03953, section 2.3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import initialization as init

from hf_mos import MoSLMHead


class PaperHead(MoSLMHead):
    """Equivalent to: `mos_log_probs(dropout(tanh(shift(h))), prior(h), weight)`; `shift` is the paper's `latent`."""

    dropout = 0.0  # the paper's `dropoutl`

    def add_mixture(self, **options: Any) -> None:
        super().add_mixture(**options | {"shift_rank": self.in_features})

    @torch.no_grad()
    def reset_mixture(self) -> None:
        super().reset_mixture()
        init.xavier_uniform_(self.shift.weight)

    def latents(self, hidden_states: Tensor) -> Tensor:
        latents = torch.tanh(self.shift(hidden_states)).unflatten(-1, (self.num_mixtures, -1))
        return F.dropout(latents, self.dropout, self.training)
