"""The maths of the mixture of softmaxes: the readable reference, and the same without gradients, chunk by chunk.

    N tokens, K mixtures, D width of the latents, V classes
    log_gate             = log_softmax(prior_logits)                          (N, K)
    component_logits     = latents @ decoder_weight.T (+ bias, softcap)       (N, K, V)
    component_log_probs  = log_softmax(component_logits)                      (N, K, V)
    log_probs            = logsumexp_K(log_gate + component_log_probs)        (N, V)

`mos_shortlist.py` has the maths of a shortlist. All is in log space and in fp32 or wider: a sharp softmax underflows
in probability space, and an epsilon in the logarithm adds mass. Source: Yang et al., arXiv 1711.03953, section 2.3.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mos_decoder import Decoder, WholeVocabulary, cap_, cap_logits, even, logsumexp_, tokens_per_chunk, upcast
from .mos_shortlist import mix_on_shortlist_, top_classes

REDUCTIONS = ("mean", "sum", "none")

# The latents (..., K, D); on a shortlist their mean (..., D) and what each adds to it (..., K, D).
Latents = Tensor | tuple[Tensor, Tensor]


def mos_log_probs(
    latents: Latents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    *,
    decoder_bias: Tensor | None = None,
    softcap: float | None = None,
    shortlist_size: int | None = None,
    add_log_partition: bool = False,
) -> Tensor:
    """Equivalent to: `log(sum_k softmax(prior_logits)_k * softmax(latents_k @ decoder_weight.T + decoder_bias))`.

    Args:
        latents: (..., K, D), one latent for each component. On a shortlist also the pair of their mean (..., D) and
            the offsets (..., K, D), which keeps small offsets from the rounding of the sum.
        prior_logits: (..., K), the raw output of the prior.
        decoder_weight: (V, D), the vocabulary projection that all components share.
        decoder_bias: (V,), or `None`.
        softcap: each component's logits become `softcap * tanh(logits / softcap)`; `None` for none.
        shortlist_size: M, the number of classes on which the components differ; `None` for all.
        add_log_partition: as in `mix_log_probs`.

    Returns:
        (..., V), natural log-probabilities in fp32 (fp64 for fp64). ValueError where the shapes do not fit together.
    """
    check_shapes(*split_latents(latents, shortlist_size), prior_logits, decoder_weight, decoder_bias)
    log_weights, component_logits = components(
        lambda rows: F.linear(rows, decoder_weight, decoder_bias), latents, prior_logits, softcap, shortlist_size
    )
    return mix_log_probs(component_logits, log_weights, add_log_partition)


def components(
    decoder: Callable[[Tensor], Tensor],
    latents: Latents,
    prior_logits: Tensor,
    softcap: float | None,
    shortlist_size: int | None,
) -> tuple[Tensor, Tensor]:
    """The log-weights (..., K) and logits (..., K, V) of the components, in fp32 or wider, by any decoder."""
    latents, offsets = split_latents(latents, shortlist_size)
    shared = upcast(decoder(latents))  # (..., K, V); on a shortlist (..., V)
    log_gate = F.log_softmax(upcast(prior_logits.to(shared.device)), dim=-1)
    expected = log_gate.shape if offsets is None else log_gate.shape[:-1]
    if shared.shape[:-1] != expected:
        raise ValueError(f"decoder: expected the logits of {tuple(expected)} latents, given {tuple(shared.shape)}")
    if offsets is None or shortlist_size is None:
        return log_gate, cap_logits(shared, softcap)
    own = upcast(decoder(latents.unsqueeze(-2) + offsets))  # (..., K, V)
    classes = top_classes(shared.detach(), shortlist_size)[1].unsqueeze(-2).expand(*own.shape[:-1], -1)  # (..., K, M)
    logits = cap_logits(shared.unsqueeze(-2).expand_as(own).scatter(-1, classes, own.gather(-1, classes)), softcap)
    return F.log_softmax(log_gate + torch.logsumexp(logits, dim=-1), dim=-1), logits


def split_latents(latents: Latents, shortlist_size: int | None) -> tuple[Tensor, Tensor | None]:
    """The latents (..., K, D) and `None`; on a shortlist the mean latent (..., D) and the offsets (..., K, D)."""
    if shortlist_size is None:
        if not isinstance(latents, Tensor):
            raise ValueError("shortlist_size: expected an int with a mean latent and offsets, given None")
        return latents, None
    if not isinstance(shortlist_size, int) or shortlist_size < 1:
        raise ValueError(f"shortlist_size: expected an int of at least 1, or None, given {shortlist_size!r}")
    return mean_and_rest(latents) if isinstance(latents, Tensor) else latents


def mean_and_rest(latents: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (..., D) of latents (..., K, D), and what each adds to it."""
    mean = latents.mean(dim=-2)
    return mean, latents - mean.unsqueeze(-2)


def mix_log_probs(component_logits: Tensor, prior_logits: Tensor, add_log_partition: bool = False) -> Tensor:
    """Equivalent to: `log(sum_k softmax(prior_logits)_k * softmax(component_logits_k))`, (..., V) in fp32 or wider.

    Args:
        component_logits, prior_logits: (..., K, V) and (..., K), any float dtype.
        add_log_partition: add `-logsumexp_k(log_softmax(prior_logits)_k - logsumexp(component_logits_k))`, one number
            for all classes: the logarithm of the harmonic mean of the components' partition functions. Where all
            components are one softmax, the result is that softmax's logits.
    """
    log_gate = F.log_softmax(upcast(prior_logits), dim=-1)
    component_logits = upcast(component_logits)
    component_log_probs = F.log_softmax(component_logits, dim=-1)
    joint = log_gate.unsqueeze(-1) + component_log_probs
    # A class that all components give -inf: the gradient of its logsumexp is 0, where torch's is NaN.
    log_probs = torch.logsumexp(joint.clamp(min=torch.finfo(joint.dtype).min), dim=-2)
    log_probs = log_probs.masked_fill(joint.amax(dim=-2) == -torch.inf, -torch.inf)
    if not add_log_partition:
        return log_probs
    log_partition = mean_log_partition(log_gate, component_logits.amax(-1), component_log_probs.amax(-1))
    return log_probs + log_partition.unsqueeze(-1)


def mean_log_partition(log_weights: Tensor, logit: Tensor, log_prob: Tensor) -> Tensor:
    """The logarithm (...) of the components' harmonic mean partition function, by a finite logit (..., K) of each."""
    return -torch.logsumexp(log_weights - (logit - log_prob).nan_to_num(), dim=-1)  # a shard may be at -inf throughout


@torch.no_grad()
def infer_log_probs(
    latents: Latents,
    prior_logits: Tensor,
    decoder_weight: Tensor,
    *,
    decoder_bias: Tensor | None = None,
    softcap: float | None = None,
    shortlist_size: int | None = None,
    add_log_partition: bool = False,
    vocabulary: Any = None,
    matmul: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Equivalent to: `mos_log_probs` for latents of (N, K, D) in the decoder's dtype, chunk by chunk, no gradients.

    Args:
        vocabulary: `None` for the whole one. With a shard the weight and the bias have its rows alone, and so has the
            result, (N, V_r). All processes must call this together.
        matmul: computes `F.linear(rows, decoder_weight, decoder_bias)` as a new tensor in place of our own matmul.
    """
    latents, offsets = split_latents(latents, shortlist_size)
    N, V_r, device = prior_logits.shape[0], decoder_weight.shape[0], decoder_weight.device
    vocabulary = WholeVocabulary(V_r) if vocabulary is None else vocabulary
    dtype = upcast(decoder_weight[:0]).dtype
    decoder = Decoder(decoder_weight, decoder_bias, softcap, vocabulary, dtype, matmul)
    log_gate = F.log_softmax(upcast(prior_logits), dim=-1)
    rows_per_token = log_gate.shape[1] if offsets is None else 1
    bytes_per_logit = dtype.itemsize + (decoder_weight.itemsize if decoder_weight.dtype != dtype else 0)
    size = even(N, tokens_per_chunk(rows_per_token, vocabulary.num_classes, bytes_per_logit, device))

    def of_chunk(tokens: slice) -> Tensor:
        gate = log_gate[tokens]  # (n, K)
        logits = decoder.logits(latents[tokens].flatten(0, -2))
        if offsets is not None and shortlist_size is not None:
            mix_on_shortlist_(logits, offsets[tokens], gate, decoder, shortlist_size)
            return logits if add_log_partition else vocabulary.log_softmax_(logits)  # of one softmax
        cap_(logits, softcap)
        component_logits = logits.unflatten(0, gate.shape)
        largest_logit = component_logits.amax(dim=-1) if add_log_partition and V_r else None  # a shard may be empty
        joint = vocabulary.log_softmax_(component_logits)
        log_partition = None if largest_logit is None else mean_log_partition(gate, largest_logit, joint.amax(dim=-1))
        log_probs = logsumexp_(joint.add_(gate.unsqueeze(-1)))[0].squeeze(1)
        return log_probs if log_partition is None else log_probs.add_(log_partition.unsqueeze(-1))

    if size >= N:
        return of_chunk(slice(N))
    log_probs = torch.empty(N, V_r, dtype=dtype, device=device)
    for start in range(0, N, size):
        log_probs[start : start + size] = of_chunk(slice(start, start + size))
    return log_probs


def reduce(nll: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """The `nll` (N,), zero where a token does not count: as it is, its sum, or its mean over the tokens that count."""
    return nll if reduction == "none" else nll.sum() / divisor(counts, reduction)


def divisor(counts: Tensor, reduction: str) -> Tensor | int:
    """The divisor of the summed loss; at least 1, so that a batch in which no token counts has a loss of zero."""
    return counts.sum().clamp(min=1) if reduction == "mean" else 1


def count_items(targets: Tensor, num_items_in_batch: Tensor | int | None, ignore_index: int = -100) -> Tensor:
    """The divisor of a batch's summed loss: the number given, else that of targets not ignored; 1 in place of 0."""
    num_items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return (given := torch.as_tensor(num_items, device=targets.device)).masked_fill(given == 0, 1)


def check_shapes(
    latents: Tensor, offsets: Tensor | None, prior_logits: Tensor, decoder_weight: Tensor, decoder_bias: Tensor | None
) -> None:
    """Raises a ValueError where the shapes do not fit together."""
    *leading, width = latents.shape if offsets is None else offsets.shape
    if offsets is not None and latents.shape != (*leading[:-1], width):
        given = f"{tuple(latents.shape)} and {tuple(offsets.shape)}"
        raise ValueError(f"latents: expected a mean (..., D) and offsets (..., K, D), given {given}")
    if len(leading) < 1 or prior_logits.shape != tuple(leading):
        raise ValueError(f"prior_logits: expected {tuple(leading)} as the latents, given {tuple(prior_logits.shape)}")
    if decoder_weight.dim() != 2 or decoder_weight.shape[1] != width:
        raise ValueError(f"decoder_weight: expected (V, {width}) as the latents, given {tuple(decoder_weight.shape)}")
    if decoder_bias is not None and decoder_bias.shape != decoder_weight.shape[:1]:
        raise ValueError(f"decoder_bias: expected ({decoder_weight.shape[0]},), given {tuple(decoder_bias.shape)}")
