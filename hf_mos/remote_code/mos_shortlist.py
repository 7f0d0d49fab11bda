"""A mixture that costs about one softmax: components that differ on a shortlist of the likeliest classes.

    n tokens, K mixtures, M shortlist_size, V classes
    mean_latent = mean_K(latents), offsets_k = latent_k - mean_latent
    z         = mean_latent @ weight.T (+ bias)                                (n, V)
    shortlist = the M classes of largest z                                     (n, M)
    component_logits_k = z + [in the shortlist] * offsets_k . weight           (n, K, V), never made
    gate      = softmax(prior_logits), mixture_weights_k in proportion to gate_k * sum_V exp(component_logits_k)

So a component has its own logits on the shortlist, those of the full mixture, and the components' mean elsewhere. As
all share the other classes, the mixture is exactly ONE softmax, of logits that are not linear in the hidden state:

    logits    = logsumexp_K(log gate_k + component_logits_k) on the shortlist, z elsewhere       (n, V)

So a step makes the three wide products of a softmax, and the rest is (n, K, M). With
`error = softmax(logits) - onehot` and `share = softmax_K(log gate_k + component_logits_k)`:

    d z = error,  d (offsets_k . weight) = share_k * error,  d log gate_k = sum over the shortlist of share_k * error

A softcap acts on every component's logits. The choice of the shortlist carries no gradient, and the label has no part
in it, or a perplexity would be no likelihood. The mean latent reaches every class, outside the shortlist too.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mos_decoder import Decoder, cap_, cap_logits, logsumexp_, upcast
from .mos_matmul import is_recorded, multiply

GROUP = 8  # classes whose maximum is searched in their place


def top_classes(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Equivalent to: `logits.topk(count)`, in any order; logits (..., V), both results (..., min(count, V)).

    They lie in the `count` groups of largest maxima. A group has every G-th class, so maxima are those of whole rows.
    At V = 8192, count = 64 it takes 0.55 of the time of topk (32 rows, an EPYC of family 25).
    """
    V, G = logits.shape[-1], logits.shape[-1] // GROUP
    is_small = not torch.compiler.is_compiling() and logits.numel() < 2**15  # topk alone is as fast
    if is_small or 2 * count > G:
        return logits.topk(min(count, V), sorted=False)
    maxima = logits.detach()[..., : GROUP * G].unflatten(-1, (GROUP, G)).amax(dim=-2)
    best = top_classes(maxima, count)[1].unsqueeze(-2)  # (..., 1, count)
    members = (best + G * torch.arange(GROUP, device=logits.device).unsqueeze(-1)).flatten(-2)
    rest = torch.arange(GROUP * G, V, device=logits.device).expand(*members.shape[:-1], -1)
    members = torch.cat([members, rest], dim=-1)
    chosen, best = logits.gather(-1, members).topk(count, sorted=False)
    return chosen, members.gather(-1, best)


def shortlist_logits(
    weight: Tensor, bias: Tensor | None, latents: Any, prior_logits: Tensor, softcap: float | None, size: int
) -> Tensor:
    """The logits (n, V) of the one softmax that the mixture equals, in fp32 or wider. Differentiable."""
    mean_latent, offsets = latents  # by few operations, as a token that is decoded waits for each of them
    linear, table = (F.linear, upcast(weight)) if is_recorded() else (multiply, weight)
    z = upcast(linear(mean_latent, weight, bias))  # (n, V)
    chosen, shortlist = top_classes(z, size)  # (n, M)
    # Many tokens share a row: in fp32 its gradient is the exact sum.
    rows = F.embedding(shortlist, table).to(offsets.dtype)  # (n, M, D)
    differences = upcast(torch.bmm(offsets, rows.transpose(1, 2)))  # (n, K, M)
    if softcap is not None:
        differences = cap_logits(chosen.unsqueeze(1) + differences, softcap) - cap_logits(chosen, softcap).unsqueeze(1)
    joint = upcast(prior_logits.to(z.device)).log_softmax(dim=-1).unsqueeze(-1) + differences  # finite
    mixed = cap_logits(chosen, softcap) + (joint.amax(dim=1) - joint.log_softmax(dim=1).amax(dim=1))  # logsumexp
    return cap_logits(z, softcap).scatter(1, shortlist, mixed.to(z.dtype))


class OnShortlist(NamedTuple):
    """The components of n tokens on their shortlists, as the gradients need them."""

    shortlist: Tensor  # (n, M)
    is_in: Tensor | None  # (n, M), which of this process's candidates count; `None`: all
    weights: Tensor  # (n, K, M), the gate times exp(component logits), by the largest component's
    total: Tensor  # (n, 1, M), the sum of the weights, at least 1; 0 for a class at -inf
    slope: Tensor | None  # (n, K, M), the derivative of the softcap


def mix_on_shortlist_(
    z: Tensor, offsets: Tensor, log_gate: Tensor, decoder: Decoder, size: int, slope: Tensor | None = None
) -> OnShortlist:
    """Replaces z (n, V) by the logits of the one softmax, in place; `slope` gets the softcap's derivative."""
    chosen, shortlist = top_classes(z, size)  # (n, M)
    is_in = decoder.vocabulary.in_shortlist(chosen, size)
    products = offsets.new_empty(*shortlist.shape, offsets.shape[1])  # (n, M, K): MKL takes 0.7 of the time for it
    for part, rows in decoder.rows_of(shortlist):
        torch.bmm(rows, offsets[part].transpose(1, 2), out=products[part])
    logits = products.transpose(1, 2).contiguous().to(decoder.sum_dtype)  # (n, K, M)
    if is_in is not None:
        logits.mul_(is_in.unsqueeze(1))
    logits.add_(chosen.unsqueeze(1))
    component_slope = None if slope is None else torch.empty_like(logits)
    cap_(logits, decoder.softcap, component_slope)
    cap_(z, decoder.softcap, slope)
    mixed, total = logsumexp_(logits.add_(log_gate.unsqueeze(-1)))  # logits become weights
    z.scatter_(1, shortlist, mixed.squeeze(1))
    return OnShortlist(shortlist, is_in, logits, total, component_slope)
