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

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SubspaceLatents(NamedTuple):
    """Equivalent to: the latents `hidden_states.unsqueeze(-2) + shifts @ basis.T`, (..., K, E).

    The components differ inside one subspace of rank R that they share, so their logits are one product of full width
    that all share and K of width R: `h @ W.T + shift_k @ (W @ basis).T`, 1 + K R / E softmax heads instead of K.
    """

    hidden_states: Tensor  # (..., E)
    shifts: Tensor  # (..., K, R)
    basis: Tensor  # (E, R)

    def dense(self) -> Tensor:
        return self.hidden_states.unsqueeze(-2) + self.shifts @ self.basis.T


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


class MixtureOfSoftmaxes(nn.Module):
    """Equivalent to: `sum_k softmax(prior(x))_k * softmax(softmax_layers[k](x))`, a classifier with K softmax layers.

    Each mixture has a class matrix of its own. To share one matrix among the mixtures, as a language model with a
    large vocabulary should, use [`MoSLMHead`].

    Example:

    ```python
    mos = MixtureOfSoftmaxes(num_mixtures=3, input_size=128, num_classes=10)
    x = torch.randn(32, 128)
    probs = mos(x)  # (32, 10)
    probs, weights = mos(x, need_weights=True)  # (32, 10), (32, 3)
    mos.loss(x, targets).backward()  # targets (32,)
    ```

    Args:
        num_mixtures: K, the number of softmaxes.
        input_size: D, the width of the input.
        num_classes: V, the number of classes.

    Raises:
        ValueError: an argument is not an int of at least 1, or an input's last dimension is not `input_size`.

    Source: Yang et al. 2018, arXiv 1711.03953, section 2.3, there with one shared class matrix.
    """

    def __init__(self, num_mixtures: int, input_size: int, num_classes: int) -> None:
        super().__init__()
        sizes = {"num_mixtures": num_mixtures, "input_size": input_size, "num_classes": num_classes}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected an int of at least 1, given {size!r}")
        self.num_mixtures, self.input_size, self.num_classes = num_mixtures, input_size, num_classes
        self.prior = nn.Linear(input_size, num_mixtures)
        self.softmax_layers = nn.ModuleList(nn.Linear(input_size, num_classes) for _ in range(num_mixtures))

    def forward(self, x: Tensor, need_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Probabilities of the classes.

        Args:
            x: (..., input_size).
            need_weights: also return the mixture weights.

        Returns:
            (..., num_classes), rows that sum to one; with `need_weights` also (..., num_mixtures), rows that sum to
            one. Train through `log_prob` or `loss`: a probability that underflows to zero has no logarithm.
        """
        probs = self.log_prob(x).exp()
        return (probs, widen(self.prior(x)).softmax(dim=-1)) if need_weights else probs

    def log_prob(self, x: Tensor) -> Tensor:
        """Natural log-probabilities (..., num_classes) for `x` (..., input_size), in fp32 or wider."""
        if x.shape[-1:] != (self.input_size,):
            raise ValueError(f"x: expected (..., {self.input_size}), given {tuple(x.shape)}")
        component_logits = torch.stack([layer(x) for layer in self.softmax_layers], dim=-2)
        return mix_log_probs(component_logits, self.prior(x))

    def loss(self, x: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
        """Equivalent to: `F.nll_loss(log_prob(x), targets)`, in nats, for `targets` (...) of class indices."""
        log_probs = self.log_prob(x).flatten(0, -2)
        if targets.shape != x.shape[:-1]:
            raise ValueError(f"targets: expected {tuple(x.shape[:-1])}, given {tuple(targets.shape)}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', given {reduction!r}")
        nll = F.nll_loss(log_probs, targets.flatten(), ignore_index=ignore_index, reduction="none")
        if reduction == "none":
            return nll.view(targets.shape)
        if reduction == "sum":
            return nll.sum()
        return nll.sum() / (targets != ignore_index).sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"num_mixtures={self.num_mixtures}, input_size={self.input_size}, num_classes={self.num_classes}"
