"""A mixture that costs about one softmax: components that differ on a shortlist of the likeliest classes.

    n tokens, K mixtures, M shortlist_size, V classes
    mean_latent = mean_K(latents), offsets_k = latent_k - mean_latent
    z         = mean_latent @ weight.T (+ bias)                                (n, V)
    shortlist = the M classes of largest z                                     (n, M)
    component_logits_k = z + [in the shortlist] * offsets_k . weight           (n, K, V), never made
    gate      = softmax(prior_logits), mixture_weights_k in proportion to gate_k * sum_V exp(component_logits_k)

So a component has its own logits on the shortlist, those of the full mixture, and the components' mean elsewhere. The
mixture is exactly ONE softmax, as its components share all other classes:

    logits    = logsumexp_K(log gate_k + component_logits_k) on the shortlist, z elsewhere       (n, V)

So a step makes the three wide products of a softmax, and the rest is (n, K, M). With
`error = softmax(logits) - onehot` and `share = softmax_K(log gate_k + component_logits_k)`:

    d z = error,  d (offsets_k . weight) = share_k * error,  d log gate_k = sum over the shortlist of share_k * error

A softcap acts on every component's logits. The label has no part in the choice of the shortlist, or a perplexity would
be no likelihood. The choice carries no gradient.
"""

import torch
from torch import Tensor

from .mos_matmul import multiply
from .mos_projections import (
    Accumulator,
    DecoderUse,
    Projection,
    Tokens,
    Wanted,
    through_basis,
    weighted,
    write_product,
)

BLOCK = 64  # classes whose maximum is compared first
SEARCHED_ROWS = 64  # tokens that are searched at a time
GATHER_BYTES = 4 * 2**20  # of the decoder's rows that are gathered at a time


def top_classes(logits: Tensor, count: int) -> Tensor:
    """Equivalent to: `logits.topk(count).indices`, in any order; logits (..., V), result (..., min(count, V)).

    The `count` largest numbers lie in the `count` blocks of largest maxima. So two small searches replace a large one.
    """
    V = logits.shape[-1]
    num_blocks = V // BLOCK
    if count >= num_blocks:
        return logits.topk(min(count, V), sorted=False).indices
    if logits.dim() == 2 and logits.shape[0] > SEARCHED_ROWS and not torch.compiler.is_compiling():
        return torch.cat([top_classes(part, count) for part in logits.split(SEARCHED_ROWS)])
    blocks = logits[..., : num_blocks * BLOCK].unflatten(-1, (num_blocks, BLOCK))
    best = blocks.amax(dim=-1).topk(count, sorted=False).indices  # (..., M)
    members = best.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=logits.device)
    rest = torch.arange(num_blocks * BLOCK, V, device=logits.device).expand(*members.shape[:-2], -1)
    members = torch.cat([members.flatten(-2), rest], dim=-1)
    places = logits.gather(-1, members).topk(count, sorted=False).indices
    return members.gather(-1, places)


class ShortlistProjection(Projection):
    """The logits of the one softmax that the mixture equals, as this module's docstring has them."""

    def __init__(
        self,
        mean_latent: Tensor,
        offsets: Tensor,
        basis: Tensor | None,
        size: int,
        log_prior: Tensor,
        decoder: DecoderUse,
        wanted: Wanted,
    ) -> None:
        self.mean_latent, self.offsets, self.basis, self.size = mean_latent, offsets, basis, size
        self.decoder, self.weight, self.log_gate = decoder, decoder.weight, log_prior
        self.log_weights = torch.zeros_like(log_prior[:, :1])  # of one softmax
        wants_mean, wants_offsets, *wants_basis = wanted.latents
        self.d_mean = torch.zeros_like(mean_latent) if wants_mean else None
        self.d_offsets = torch.zeros_like(offsets) if wants_offsets else None
        self.wants_basis = any(wants_basis)
        self.d_weight = Accumulator(self.weight, wanted.weight, decoder.sum_dtype)
        # The offsets multiply rows of the decoder, or of the decoder in the basis.
        self.rows_of_classes, self.d_rows = self.weight, self.d_weight
        if basis is not None:
            self.rows_of_classes = self.weight @ basis  # (V, R)
            wants_rows = wanted.weight or self.wants_basis
            self.d_rows = Accumulator(self.rows_of_classes, wants_rows, decoder.sum_dtype)

    def logits(self, tokens: Tokens, place: slice, out: Tensor, half: Tensor | None, slope: Tensor | None) -> None:
        self.rows = self.mean_latent[tokens]
        write_product(self.rows, self.weight, self.decoder.bias, out, half)
        self.mix_(tokens, out, slope)

    def component_logits(self, tokens: slice) -> Tensor:
        logits = self.decoder.logits(self.mean_latent[tokens])
        self.mix_(tokens, logits, None)
        return logits.unsqueeze(1)

    def mix_(self, tokens: Tokens, z: Tensor, slope: Tensor | None) -> None:
        """Replaces z (n, V) by the logits of the one softmax, in place."""
        self.shortlist = top_classes(z, self.size)
        chosen = z.gather(1, self.shortlist)  # (n, M)
        self.is_in = self.decoder.vocabulary.in_shortlist(chosen, self.size)
        differences = self.differences(tokens)
        if self.is_in is not None:
            differences.mul_(self.is_in.unsqueeze(1))
        logits = differences.add_(chosen.unsqueeze(1))  # (n, K, M)
        self.slope = None if slope is None else torch.empty_like(logits)
        self.cap(logits, self.slope)
        self.cap(z, slope)
        joint = logits.add_(self.log_gate[tokens].unsqueeze(-1))
        mixed = torch.logsumexp(joint, dim=1)
        # A class at -inf has no share; -inf - -inf would be NaN, and stay it times an error of zero.
        self.shares = joint.sub_(mixed.clamp(min=torch.finfo(mixed.dtype).min).unsqueeze(1)).exp_()
        z.scatter_(1, self.shortlist, mixed)

    def differences(self, tokens: Tokens) -> Tensor:
        """`offsets_k . weight` on the shortlist, (n, K, M), in `sum_dtype`."""
        offsets = self.chunk_offsets = self.offsets[tokens]
        out = offsets.new_empty(*offsets.shape[:2], self.shortlist.shape[1], dtype=self.decoder.sum_dtype)
        for part in self.parts():
            out[part] = torch.bmm(offsets[part], self.gather(part).transpose(1, 2))
        return out

    def parts(self) -> list[slice]:
        """The tokens of the chunk, as many at a time as their rows of the decoder fit into `GATHER_BYTES`."""
        n, M = self.shortlist.shape
        bytes_per_token = M * self.rows_of_classes.shape[1] * self.weight.itemsize
        size = max(1, GATHER_BYTES // max(1, bytes_per_token))  # a process of many may hold no class
        return [slice(start, start + size) for start in range(0, n, size)]

    def gather(self, part: slice) -> Tensor:
        """The rows of the shortlist's classes, (n, M, E) or (n, M, R)."""
        shortlist = self.shortlist[part]
        return self.rows_of_classes.index_select(0, shortlist.flatten()).unflatten(0, shortlist.shape)

    def through_cap(self, error: Tensor, slope: Tensor | None, row_weights: Tensor) -> Tensor:
        d_logits = self.shares.mul_(error.gather(1, self.shortlist).unsqueeze(1))  # (n, K, M)
        self.d_log_gate = d_logits.sum(-1)
        if slope is not None and self.slope is not None:
            d_logits.mul_(self.slope)
            error.mul_(slope).scatter_(1, self.shortlist, d_logits.sum(1))
        d_differences = d_logits.mul_(row_weights.unsqueeze(-1))
        if self.is_in is not None:
            d_differences.mul_(self.is_in.unsqueeze(1))
        self.d_differences = d_differences.to(self.weight.dtype)
        return error

    def d_prior_logits(self, tokens: Tokens, responsibilities: Tensor) -> Tensor:
        d_log_gate = self.d_log_gate
        self.decoder.vocabulary.sum_(d_log_gate)
        return d_log_gate - self.log_gate[tokens].exp() * d_log_gate.sum(-1, keepdim=True)

    def backward(self, tokens: Tokens, place: slice, error: Tensor, row_weights: Tensor | None) -> None:
        if self.d_mean is not None:
            self.d_mean[tokens] = weighted(multiply(error, self.weight.t()), row_weights)
        self.d_weight.add_product(error.t(), weighted(self.rows, row_weights))
        if self.d_offsets is not None:
            d_offsets = torch.empty_like(self.chunk_offsets)
            for part in self.parts():
                torch.bmm(self.d_differences[part], self.gather(part), out=d_offsets[part])
            self.d_offsets[tokens] = d_offsets
        if self.d_rows.total is not None:
            for part in self.parts():
                d_rows = torch.bmm(self.d_differences[part].transpose(1, 2), self.chunk_offsets[part])  # (n, M, E)
                self.d_rows.add_rows(self.shortlist[part].flatten(), d_rows.flatten(0, 1))

    def gradients(self) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        d_weight = self.d_weight.result()
        if self.basis is None:
            return (self.d_mean, self.d_offsets), d_weight
        d_basis = None
        if (d_rows := self.d_rows.result()) is not None:
            d_basis = through_basis(d_rows, d_weight, self.weight, self.basis, self.wants_basis)
        return (self.d_mean, self.d_offsets, d_basis), d_weight
