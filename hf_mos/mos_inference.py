"""The mixture's log-probabilities without gradients, one chunk of tokens at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixture_of_softmaxes import SubspaceLatents, cap_logits, mix_log_probs, widen
from .mos_chunks import tokens_per_chunk

# Up to this many rows a product is bound by reading the weight, and `weight @ rows.T` takes 0.5, 0.8, 1.3 and 2.2 of
# `F.linear(row, weight)` for 4, 8, 16 and 32 rows of 768 (50257 outputs, 2 CPU threads); `F.linear(rows, weight)`
# takes 1.8, 1.8, 2.2 and 2.9.
FEW_ROWS = 64
# Outputs at a time, so that they are transposed while they are in the cache: 1.35 for 16 rows, where one product of
# all outputs takes 1.6.
TILE = 4096


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
    dtype, device = widen(decoder_weight[:0]).dtype, decoder_weight.device
    log_probs = torch.empty(N, V, dtype=dtype, device=device)
    size = tokens_per_chunk(K, V, 3 * dtype.itemsize, device)
    for start in range(0, N, size):
        tokens = slice(start, start + size)
        if isinstance(latents, SubspaceLatents):
            shared = project_rows(latents.hidden_states[tokens], decoder_weight)
            logits = project_rows(latents.shifts[tokens].flatten(0, 1), narrow_weight)
            logits = logits.view(-1, K, V) + shared.unsqueeze(1)
        else:
            logits = project_rows(latents[tokens].flatten(0, 1), decoder_weight).view(-1, K, V)
        if decoder_bias is not None:
            logits = logits + decoder_bias
        log_probs[tokens] = mix_log_probs(cap_logits(widen(logits), softcap), prior_logits[tokens])
    return log_probs


def project_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """Equivalent to: `F.linear(rows, weight)`; faster for few rows on the CPU."""
    count = rows.shape[0]
    if count > FEW_ROWS or weight.device.type != "cpu":
        return F.linear(rows, weight)
    if count == 1:
        rows = rows.repeat(2, 1)  # a product with one vector takes 2.5 times as long as with two
    tiles = [torch.mm(tile, rows.t()).t() for tile in weight.split(TILE)]
    return torch.cat(tiles, dim=1)[:count]
