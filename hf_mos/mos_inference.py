"""The mixture's log-probabilities without gradients, one chunk of tokens at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixture_of_softmaxes import SubspaceLatents, cap_logits, widen
from .mos_chunks import tokens_per_chunk

# Up to this many rows a product is bound by reading the decoder. `weight @ rows.T` then takes 0.5, 0.9, 1.6 and 2.3 of
# the one-row product for 4, 8, 16 and 32 rows of 768 (V = 50257, 2 CPU threads), where `rows @ weight.T` takes 1.8,
# 1.8, 2.2 and 2.9.
FEW_ROWS = 64


@torch.no_grad()
def infer_log_probs(
    latents: Tensor | SubspaceLatents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    *,
    decoder_bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Equivalent to: `mos_log_probs(latents, prior_logits, decoder_weight)` without its (N, K, V) copies.

    Args:
        latents: (N, K, E), or the [`SubspaceLatents`] that stand for them.
        prior_logits: (N, K).
        decoder_weight: (V, E), in the dtype of the latents.
        decoder_bias: (V,), or `None`.
        softcap: as in `mos_log_probs`.

    Returns:
        (N, V), natural log-probabilities in fp32 (fp64 for fp64).
    """
    N, K = prior_logits.shape
    V = decoder_weight.shape[0]
    if isinstance(latents, SubspaceLatents) and latents.basis.shape[1] >= N * (K - 1):
        latents = latents.dense()  # so few tokens cost less than W @ basis
    narrow_weight = decoder_weight @ latents.basis if isinstance(latents, SubspaceLatents) else decoder_weight
    log_prior = F.log_softmax(widen(prior_logits), dim=-1)
    log_probs = torch.empty(N, V, dtype=log_prior.dtype, device=log_prior.device)
    size = tokens_per_chunk(K, V, 2 * log_prior.dtype.itemsize, log_prior.device)
    for start in range(0, N, size):
        tokens = slice(start, start + size)
        if isinstance(latents, SubspaceLatents):
            shared = _project(latents.hidden_states[tokens], decoder_weight)
            logits = _project(latents.shifts[tokens].flatten(0, 1), narrow_weight)
            logits = logits.view(-1, K, V) + shared.unsqueeze(1)
        else:
            logits = _project(latents[tokens].flatten(0, 1), decoder_weight).view(-1, K, V)
        if decoder_bias is not None:
            logits = logits + decoder_bias
        logits = cap_logits(widen(logits), softcap)
        logits -= logits.amax(dim=-1, keepdim=True)  # first, so that large logits keep their differences
        logits += (log_prior[tokens] - torch.logsumexp(logits, dim=-1)).unsqueeze(-1)
        torch.logsumexp(logits, dim=1, out=log_probs[tokens])
    return log_probs


def _project(rows: Tensor, weight: Tensor) -> Tensor:
    """Equivalent to: `rows @ weight.T`, contiguous."""
    if rows.shape[0] <= FEW_ROWS:
        return torch.mm(weight, rows.t()).t().contiguous()
    return torch.mm(rows, weight.t())
