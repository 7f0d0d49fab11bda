"""The maths of the mixture of softmaxes, in its readable form.

    N tokens, K mixtures, D input_size, E latent_size, V classes
    log_prior            = log_softmax(prior_logits)                          (N, K)
    component_logits     = latents @ decoder_weight.T (+ bias, softcap)       (N, K, V)
    component_log_probs  = log_softmax(component_logits)                      (N, K, V)
    log_probs            = logsumexp_K(log_prior + component_log_probs)       (N, V)

Always in log space and in fp32 or wider: a sharp softmax underflows in probability space, and an epsilon inside the
logarithm caps the loss and adds mass.

Source: Yang, Dai, Salakhutdinov, Cohen: Breaking the Softmax Bottleneck, arXiv 1711.03953, section 2.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mos_latents import SubspaceLatents


def widen(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Equivalent to: `softcap * tanh(logits / softcap)`; `None` leaves them as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def mix_log_probs(component_logits: Tensor, prior_logits: Tensor) -> Tensor:
    """Equivalent to: `log(sum_k softmax(prior_logits)_k * softmax(component_logits_k))`.

    Args:
        component_logits: (..., K, V), any float dtype.
        prior_logits: (..., K), any float dtype.

    Returns:
        (..., V), natural log-probabilities in fp32 (fp64 for fp64); their exponentials sum to one.
    """
    log_prior = F.log_softmax(widen(prior_logits), dim=-1)
    component_log_probs = F.log_softmax(widen(component_logits), dim=-1)
    return torch.logsumexp(log_prior.unsqueeze(-1) + component_log_probs, dim=-2)


def mos_log_probs(
    latents: Tensor | SubspaceLatents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    *,
    decoder_bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Equivalent to: `log(sum_k softmax(prior_logits)_k * softmax(latents_k @ decoder_weight.T + decoder_bias))`.

    The reference that the fast loss is tested against, with the same arguments as `mos_cross_entropy`.

    Args:
        latents: (..., K, E), one latent for each component, or the [`SubspaceLatents`] that stand for them.
        prior_logits: (..., K), the raw output of the prior.
        decoder_weight: (V, E), the vocabulary projection that all components share.
        decoder_bias: (V,), or `None`.
        softcap: each component's logits become `softcap * tanh(logits / softcap)`; `None` for none.

    Returns:
        (..., V), natural log-probabilities in fp32 (fp64 for fp64). Differentiable.

    Raises:
        ValueError: the shapes do not fit together.
    """
    check_shapes(latents, prior_logits, decoder_weight, decoder_bias)
    dense = latents.dense() if isinstance(latents, SubspaceLatents) else latents
    component_logits = cap_logits(F.linear(dense, decoder_weight, decoder_bias), softcap)
    return mix_log_probs(component_logits, prior_logits)


def check_shapes(
    latents: Tensor | SubspaceLatents, prior_logits: Tensor, decoder_weight: Tensor, decoder_bias: Tensor | None
) -> None:
    if isinstance(latents, SubspaceLatents):
        hidden_states, shifts, basis = latents
        width, leading = hidden_states.shape[-1], shifts.shape[:-1]
        if leading[:-1] != hidden_states.shape[:-1] or basis.shape != (width, shifts.shape[-1]):
            shapes = ", ".join(str(tuple(part.shape)) for part in latents)
            raise ValueError(f"latents: expected (..., E), (..., K, R) and (E, R), given {shapes}")
    else:
        width, leading = latents.shape[-1], latents.shape[:-1]
    if len(leading) < 1 or prior_logits.shape != leading:
        raise ValueError(f"prior_logits: expected {tuple(leading)} as the latents, given {tuple(prior_logits.shape)}")
    if decoder_weight.dim() != 2 or decoder_weight.shape[1] != width:
        raise ValueError(f"decoder_weight: expected (V, {width}) as the latents, given {tuple(decoder_weight.shape)}")
    if decoder_bias is not None and decoder_bias.shape != decoder_weight.shape[:1]:
        raise ValueError(f"decoder_bias: expected ({decoder_weight.shape[0]},), given {tuple(decoder_bias.shape)}")
