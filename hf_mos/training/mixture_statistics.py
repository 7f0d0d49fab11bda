"""Statistics of a mixture on tokens: mixture weights, responsibilities, divergences between components.

N tokens, n of them in a chunk, K mixtures, V classes
log_prior            (n, K), of the mixture itself
component_log_probs  (n, K, V), of one chunk at a time
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..remote_code.mos_decoder import tokens_per_chunk
from ..remote_code.mos_log_probs import components

BYTES_PER_LOGIT = 16  # log-probabilities, probabilities and temporaries


class MixturePredictions(NamedTuple):
    """The predictions of each component for a chunk of tokens."""

    log_prior: Tensor  # (n, K)
    component_log_probs: Tensor  # (n, K, V)
    component_probs: Tensor  # (n, K, V)

    def component_entropies(self) -> Tensor:
        """The entropy of each component (n, K), in nats."""
        return entropy(self.component_log_probs, self.component_probs)

    def log_probs(self) -> Tensor:
        """The mixture's natural log-probabilities, (n, V)."""
        return torch.logsumexp(self.log_prior.unsqueeze(-1) + self.component_log_probs, dim=-2)

    def component_nll(self, targets: Tensor) -> Tensor:
        """The nll of each component (n, K), in nats, for targets (n,)."""
        indices = targets.view(-1, 1, 1).expand(-1, self.component_log_probs.shape[1], 1)
        return -self.component_log_probs.gather(-1, indices).squeeze(-1)


@torch.no_grad()
def predict_in_chunks(
    head: Any, hidden_states: Tensor, decoder: nn.Module | None = None
) -> Iterator[tuple[slice, MixturePredictions]]:
    """Yields each component's log-probabilities for hidden states (N, D), chunk by chunk.

    Args:
        head: a [`MoSLMHead`], also of the code beside a checkpoint.
        hidden_states: (N, D).
        decoder: a module around the head, such as an adapter, that is called as the decoder; `None`: there is none.
    """
    N, K = hidden_states.shape[0], head.num_mixtures
    size = tokens_per_chunk(K, head.out_features, BYTES_PER_LOGIT, hidden_states.device)
    for start in range(0, N, size):
        tokens = slice(start, min(start + size, N))
        latents, prior_logits = head.latents_and_prior(hidden_states[tokens])
        decode, M = head.as_decoder(decoder), head.shortlist_size
        log_prior, logits = components(decode, latents, prior_logits, head.softcap, M)
        yield tokens, MixturePredictions(log_prior, F.log_softmax(logits, dim=-1), F.softmax(logits, dim=-1))


def entropy(log_probs: Tensor, probs: Tensor | None = None) -> Tensor:
    """The entropy (...) in nats of distributions (..., V). Known `probs` save their computation."""
    if probs is None:
        probs = F.softmax(log_probs, dim=-1)  # faster than exp
    return -(log_probs.clamp(min=torch.finfo(log_probs.dtype).min) * probs).sum(-1)  # 0 log 0 is 0


class MixtureStatistics(NamedTuple):
    """Statistics over some tokens; entropies and divergences in nats."""

    mean_weights: Tensor  # (K,), mean mixture weights
    entropy: float  # mean entropy of the mixture weights; at most log K
    responsibilities: Tensor  # (K,), mean responsibilities for the targets
    divergence: Tensor  # (K, K), mean Jensen-Shannon divergence; at most log 2


class StatisticsSum:
    """Sums statistics chunk by chunk, in float64 on the CPU."""

    def __init__(self, num_mixtures: int) -> None:
        self.count = 0
        self.weights = torch.zeros(num_mixtures, dtype=torch.float64)
        self.entropy = torch.zeros((), dtype=torch.float64)
        self.responsibilities = torch.zeros(num_mixtures, dtype=torch.float64)
        self.divergence = torch.zeros(num_mixtures, num_mixtures, dtype=torch.float64)

    def add(self, predictions: MixturePredictions, targets: Tensor) -> None:
        """Adds a chunk with its targets (n,), class indices of which none is ignored."""
        log_prior = predictions.log_prior
        responsibilities = F.softmax(log_prior - predictions.component_nll(targets), dim=-1)
        self.count += len(targets)
        self.weights += _sum(log_prior.exp())
        self.entropy += _sum(entropy(log_prior))
        self.responsibilities += _sum(responsibilities)
        self.divergence += _sum(divergence(predictions))

    def add_up_over_processes(self, device: torch.device) -> None:
        """Sums over all processes. Every process must call this."""
        parts = [self.weights, self.entropy, self.responsibilities, self.divergence]
        sums = torch.cat([torch.tensor([self.count], dtype=torch.float64), *(part.flatten() for part in parts)]).to(
            device
        )
        torch.distributed.all_reduce(sums)
        count, *summed = sums.cpu().split([1, *(part.numel() for part in parts)])
        self.count = int(count)
        for part, total in zip(parts, summed, strict=True):
            part.copy_(total.view_as(part))

    def result(self) -> MixtureStatistics:
        count = max(self.count, 1)
        return MixtureStatistics(
            self.weights / count, float(self.entropy / count), self.responsibilities / count, self.divergence / count
        )


def _sum(values: Tensor) -> Tensor:
    return values.sum(0).cpu().double()


def divergence(predictions: MixturePredictions) -> Tensor:
    """The Jensen-Shannon divergence of each pair of components (n, K, K), in nats."""
    probs, entropies = predictions.component_probs, predictions.component_entropies()
    n, K = entropies.shape
    result = probs.new_zeros(n, K, K)
    for j in range(K):
        for k in range(j):
            middle = (probs[:, j] + probs[:, k]).div_(2)
            of_middle = entropy(middle.log(), middle)
            result[:, j, k] = result[:, k, j] = of_middle - (entropies[:, j] + entropies[:, k]) / 2
    return result.clamp_(min=0)  # rounding can make that of equal components negative


@torch.no_grad()
def mixture_statistics(head: Any, hidden_states: Tensor, targets: Tensor) -> MixtureStatistics:
    """Computes the statistics of a head's mixture on tokens, chunk by chunk.

    Args:
        head: a [`MoSLMHead`].
        hidden_states: (N, D).
        targets: (N,), class indices aligned with the hidden states; none that is ignored.
    """
    total = StatisticsSum(head.num_mixtures)
    for tokens, predictions in predict_in_chunks(head, hidden_states):
        total.add(predictions, targets[tokens])
    return total.result()
