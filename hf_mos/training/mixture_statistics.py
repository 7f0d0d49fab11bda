"""Statistics of a mixture on tokens: mixture weights, responsibilities, divergences between components.

N tokens, n of them in a chunk, K mixtures, V classes, M shortlist_size

On all classes a chunk holds the (n, K, V) probabilities of its components. On a shortlist it holds (n, K, M) numbers
and one row of V a token, as the components share the distribution over all other classes:

    rest             = logsumexp of the shared logits outside the shortlist                        (n,)
    log_partition_k  = logaddexp(rest, logsumexp_M(own logits_k))                                  (n, K)
    log p_k(class)   = own logit - log_partition_k on the shortlist, log_rest_k + log_shared(class) elsewhere
    log_rest_k       = rest - log_partition_k, log_shared = shared logit - rest

So the divergence of two components is that of their M + 1 probabilities: the shortlist's, and that of all others.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..remote_code.mos_decoder import cap_logits, tokens_per_chunk, upcast
from ..remote_code.mos_log_probs import components
from ..remote_code.mos_matmul import multiply
from ..remote_code.mos_shortlist import top_classes

BYTES_PER_LOGIT = 24  # log-probabilities, probabilities and temporaries


class MixturePredictions(NamedTuple):
    """The predictions of each component for a chunk of tokens."""

    log_weights: Tensor  # (n, K), the logarithms of the mixture weights
    component_log_probs: Tensor  # (n, K, V)
    component_probs: Tensor  # (n, K, V)

    def component_entropies(self) -> Tensor:
        """The entropy of each component (n, K), in nats."""
        return entropy(self.component_log_probs, self.component_probs)

    def log_probs(self) -> Tensor:
        """The mixture's natural log-probabilities, (n, V)."""
        return torch.logsumexp(self.log_weights.unsqueeze(-1) + self.component_log_probs, dim=-2)

    def component_nll(self, targets: Tensor) -> Tensor:
        """The nll of each component (n, K), in nats, for targets (n,)."""
        indices = targets.view(-1, 1, 1).expand(-1, self.component_log_probs.shape[1], 1)
        return -self.component_log_probs.gather(-1, indices).squeeze(-1)

    def divergence(self) -> Tensor:
        """The Jensen-Shannon divergence of each pair of components (n, K, K), in nats."""
        return divergence(self.component_log_probs, self.component_probs)

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """The log-probabilities and the indices of each component's likeliest classes, (n, K, count) both."""
        values, classes = self.component_log_probs.topk(count, dim=-1)
        return values, classes


class ShortlistPredictions(NamedTuple):
    """The same as [`MixturePredictions`], of components that differ on a shortlist."""

    log_weights: Tensor  # (n, K), the logarithms of the mixture weights
    shortlist: Tensor  # (n, M), classes
    log_own: Tensor  # (n, K, M), the log-probabilities of the shortlist's classes
    log_rest: Tensor  # (n, K), the log-probability of all other classes together
    log_shared: Tensor  # (n, V), the log-probabilities of the others among themselves; -inf on the shortlist

    def component_entropies(self) -> Tensor:
        of_shared = entropy(self.log_shared, self.log_shared.exp())  # not by a softmax: there may be no other class
        return entropy(self._parts()) + self.log_rest.exp() * of_shared.unsqueeze(-1)

    def log_probs(self) -> Tensor:
        elsewhere = self.log_shared + torch.logsumexp(self.log_weights + self.log_rest, dim=-1, keepdim=True)
        on_shortlist = torch.logsumexp(self.log_weights.unsqueeze(-1) + self.log_own, dim=-2)
        return elsewhere.scatter(-1, self.shortlist, on_shortlist)

    def component_nll(self, targets: Tensor) -> Tensor:
        found = self.shortlist == targets.unsqueeze(-1)  # (n, M)
        place = found.byte().argmax(-1).view(-1, 1, 1).expand(-1, self.log_own.shape[1], 1)
        own = self.log_own.gather(-1, place).squeeze(-1)
        elsewhere = self.log_rest + self.log_shared.gather(-1, targets.unsqueeze(-1))
        return -torch.where(found.any(-1, keepdim=True), own, elsewhere)

    def divergence(self) -> Tensor:
        return divergence(self._parts())

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        shared, classes = self.log_shared.topk(count, dim=-1)
        candidates = torch.cat([self.log_own, self.log_rest.unsqueeze(-1) + shared.unsqueeze(-2)], dim=-1)
        values, places = candidates.topk(count, dim=-1)
        names = torch.cat([self.shortlist, classes], dim=-1).unsqueeze(-2).expand_as(candidates)
        return values, names.gather(-1, places)

    def _parts(self) -> Tensor:
        """The log-probabilities of the shortlist's classes, and of all others together, (n, K, M + 1)."""
        return torch.cat([self.log_own, self.log_rest.unsqueeze(-1)], dim=-1)


Predictions = MixturePredictions | ShortlistPredictions


@torch.no_grad()
def predict_in_chunks(
    head: Any, hidden_states: Tensor, decoder: nn.Module | None = None
) -> Iterator[tuple[slice, Predictions]]:
    """Yields each component's log-probabilities for hidden states (N, D), chunk by chunk.

    Args:
        head: a [`MoSLMHead`], also of the code beside a checkpoint.
        hidden_states: (N, D).
        decoder: a module around the head, such as an adapter, that is called as the decoder; `None`: there is none.
    """
    N, M, decoder = hidden_states.shape[0], head.shortlist_size, None if decoder is head else decoder
    tensors: Any = None if M is None else head.read_decoder(decoder)
    if tensors is not None and (tensors[0].is_meta or tensors[2] is not None):  # offloaded; a shard of many processes
        tensors = None
    rows_per_token = head.num_mixtures if tensors is None else 1
    size = tokens_per_chunk(rows_per_token, head.out_features, BYTES_PER_LOGIT, hidden_states.device)
    for start in range(0, N, size):
        tokens = slice(start, min(start + size, N))
        latents, prior_logits = head.latents_and_prior(hidden_states[tokens])
        if tensors is not None:
            yield tokens, predict_on_shortlist(latents, prior_logits, tensors[0], tensors[1], head.softcap, M)
        else:
            log_weights, logits = components(head.as_decoder(decoder), latents, prior_logits, head.softcap, M)
            yield tokens, MixturePredictions(log_weights, F.log_softmax(logits, dim=-1), F.softmax(logits, dim=-1))


def predict_on_shortlist(
    latents: tuple[Tensor, Tensor],
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    shortlist_size: int,
) -> ShortlistPredictions:
    """The predictions for mean latents (n, D) and offsets (n, K, D), with one product as wide as V."""
    mean, offsets = latents
    weight = weight.to(mean.dtype)
    shared = upcast(multiply(mean, weight, bias))  # (n, V)
    chosen, shortlist = top_classes(shared, shortlist_size)
    size = max(1, weight.shape[0] // shortlist.shape[1])  # tokens whose rows take no more memory than the decoder
    parts = zip(offsets.split(size), shortlist.split(size), strict=True)
    own = [torch.bmm(part, F.embedding(classes, weight).transpose(1, 2)) for part, classes in parts]
    logits = cap_logits(chosen.unsqueeze(1) + upcast(torch.cat(own)), softcap)  # (n, K, M)
    shared = cap_logits(shared, softcap).scatter_(-1, shortlist, -torch.inf)
    rest = torch.logsumexp(shared, dim=-1, keepdim=True)  # -inf where the shortlist has all classes
    log_partition = torch.logaddexp(rest, torch.logsumexp(logits, dim=-1))  # (n, K)
    log_gate = F.log_softmax(upcast(prior_logits.to(rest.device)), dim=-1)
    return ShortlistPredictions(
        F.log_softmax(log_gate + log_partition, dim=-1),
        shortlist,
        logits.sub_(log_partition.unsqueeze(-1)),
        rest - log_partition,
        shared.sub_(rest.clamp(min=torch.finfo(rest.dtype).min)),
    )


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

    def add(self, predictions: Predictions, targets: Tensor) -> Tensor:
        """Adds a chunk with its targets (n,), class indices of which none is ignored; returns its responsibilities."""
        log_weights = predictions.log_weights
        responsibilities = F.softmax(log_weights - predictions.component_nll(targets), dim=-1)
        self.count += len(targets)
        self.weights += _sum(log_weights.exp())
        self.entropy += _sum(entropy(log_weights))
        self.responsibilities += _sum(responsibilities)
        self.divergence += _sum(predictions.divergence())
        return responsibilities

    def add_up_over_processes(self, device: torch.device) -> None:
        """Sums over all processes. Every process must call this."""
        parts = [self.weights, self.entropy, self.responsibilities, self.divergence]
        count = torch.tensor([self.count], dtype=torch.float64)
        sums = torch.cat([count, *(part.flatten() for part in parts)]).to(device)
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


def divergence(log_probs: Tensor, probs: Tensor | None = None) -> Tensor:
    """The Jensen-Shannon divergence of each pair (n, K, K) of K distributions (n, K, classes), in nats."""
    if probs is None:
        probs = log_probs.exp()
    n, K, _ = probs.shape
    entropies, result = entropy(log_probs, probs), probs.new_zeros(n, K, K)
    for k in range(1, K):
        middle = (probs[:, :k] + probs[:, k : k + 1]).div_(2)
        of_middle = entropy(middle.log(), middle)
        result[:, k, :k] = result[:, :k, k] = of_middle - (entropies[:, :k] + entropies[:, k : k + 1]) / 2
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
