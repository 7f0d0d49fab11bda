"""The mixture's log-probabilities without gradients, one chunk of tokens at a time."""

import torch
from torch import Tensor

from .mos_chunks import tokens_per_chunk
from .mos_latents import SubspaceLatents
from .mos_log_probs import cap_logits, mix_log_probs, widen
from .mos_matmul import multiply


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
            shared = multiply(latents.hidden_states[tokens], decoder_weight)
            logits = multiply(latents.shifts[tokens].flatten(0, 1), narrow_weight)
            logits = logits.view(-1, K, V) + shared.unsqueeze(1)
        else:
            logits = multiply(latents[tokens].flatten(0, 1), decoder_weight).view(-1, K, V)
        if decoder_bias is not None:
            logits = logits + decoder_bias
        log_probs[tokens] = mix_log_probs(cap_logits(widen(logits), softcap), prior_logits[tokens])
    return log_probs
