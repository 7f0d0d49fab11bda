"""MixtureOfSoftmaxes: a classifier with K softmax layers, each with a class matrix of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .remote_code.mos_decoder import upcast
from .remote_code.mos_log_probs import REDUCTIONS, mix_log_probs, reduce


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
        return (probs, upcast(self.prior(x)).softmax(dim=-1)) if need_weights else probs

    def log_prob(self, x: Tensor) -> Tensor:
        """Natural log-probabilities (..., num_classes) for `x` (..., input_size), in fp32 or wider."""
        if x.shape[-1:] != (self.input_size,):
            raise ValueError(f"x: expected (..., {self.input_size}), given {tuple(x.shape)}")
        component_logits = torch.stack([layer(x) for layer in self.softmax_layers], dim=-2)
        return mix_log_probs(component_logits, self.prior(x))

    def loss(self, x: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
        """Equivalent to: `F.nll_loss(log_prob(x), targets)`, in nats, for `targets` (...) of class indices."""
        log_probs = self.log_prob(x).view(-1, self.num_classes)
        if targets.shape != x.shape[:-1]:
            raise ValueError(f"targets: expected {tuple(x.shape[:-1])}, given {tuple(targets.shape)}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {REDUCTIONS}, given {reduction!r}")
        targets = targets.flatten()
        nll = F.nll_loss(log_probs, targets, ignore_index=ignore_index, reduction="none")
        loss = reduce(nll, targets != ignore_index, reduction)
        return loss.view(x.shape[:-1]) if reduction == "none" else loss

    def extra_repr(self) -> str:
        return f"num_mixtures={self.num_mixtures}, input_size={self.input_size}, num_classes={self.num_classes}"
