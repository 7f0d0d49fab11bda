"""From the latents of a chunk of tokens to their component logits, and from the errors back to the gradients.

    N tokens, n of them in a chunk, K mixtures, E latent_size, R latent_rank, V classes
    error       = softmax(component_logits) - onehot(target)      (n K, V)
    row_weights = responsibilities (times the token's weight)     (n K, 1)

The gradient of the component logits is `row_weights * error`. In fp32 and wider this product is never made: the row
weights go on the narrow side of each matmul. In half precision they join the error when it is rounded, and are `None`
in `backward`. Gradients that many tokens add to are summed in `sum_dtype`, whatever the dtype of the matmuls.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .mos_matmul import add_product_, multiply, multiply_into
from .mos_vocabulary import VocabularyShard, WholeVocabulary, cap_, widen

Tokens = slice | Tensor  # the tokens of a chunk, as an index


class DecoderUse(NamedTuple):
    """The decoder's tensors in the dtype of the matmuls, and what follows the matmul."""

    weight: Tensor  # (V, E)
    bias: Tensor | None  # (V,)
    softcap: float | None
    vocabulary: WholeVocabulary | VocabularyShard
    sum_dtype: torch.dtype
    matmul: Callable[[Tensor], Tensor] | None = None  # in place of our own, in inference

    def logits(self, rows: Tensor) -> Tensor:
        """Equivalent to: `F.linear(rows, weight, bias)` (n, V), widened, without gradients."""
        return widen(multiply(rows, self.weight, self.bias) if self.matmul is None else self.matmul(rows))


class Wanted(NamedTuple):
    """The inputs whose gradients are wanted."""

    latents: tuple[bool, ...]  # for each tensor of the latents
    weight: bool


class Projection:
    """`component_logits = latents @ weight.T`, for full latents (N, K, E). The base of the other kinds' projections.

    A group of tokens is opened, goes through chunk by chunk, and is closed; `place` is a chunk's place in its group.
    """

    shared_share = 0.0  # of the working memory, for a buffer beside the component logits

    def __init__(self, latents: Tensor, log_prior: Tensor, decoder: DecoderUse, wanted: Wanted) -> None:
        self.latents, self.log_prior, self.decoder, self.weight = latents, log_prior, decoder, decoder.weight
        self.log_weights = log_prior  # of the softmaxes whose logits are made here, (N, K)
        self.d_latents = torch.zeros_like(latents) if wanted.latents[0] else None
        self.d_weight = Accumulator(self.weight, wanted.weight, decoder.sum_dtype)

    def open(self, group: Tokens, size: int) -> None:
        """Begins a group of at most `size` tokens."""

    def logits(self, tokens: Tokens, place: slice, out: Tensor, half: Tensor | None, slope: Tensor | None) -> None:
        """Writes the component logits to `out` (n K, V), by way of `half` where the latents are half precision.

        `slope` gets the derivative of the softcap.
        """
        self.rows = self.latents[tokens].flatten(0, 1)
        write_product(self.rows, self.weight, self.decoder.bias, out, half)
        self.cap(out, slope)

    def cap(self, logits: Tensor, slope: Tensor | None) -> None:
        if self.decoder.softcap is not None:
            cap_(logits, self.decoder.softcap, slope)

    def through_cap(self, error: Tensor, slope: Tensor | None, row_weights: Tensor) -> Tensor:
        """The gradient of the logits before the softcap, in place; the `error` is that after it. Both lack weights."""
        return error if slope is None else error.mul_(slope)

    def d_prior_logits(self, tokens: Tokens, responsibilities: Tensor) -> Tensor:
        """The gradient of the prior's logits (n, K), without the tokens' weights."""
        return self.log_prior[tokens].exp() - responsibilities

    def backward(self, tokens: Tokens, place: slice, error: Tensor, row_weights: Tensor | None) -> None:
        """Adds the gradients of the last `logits`."""
        if self.d_latents is not None:
            d_rows = weighted(multiply(error, self.weight.t()), row_weights)
            self.d_latents[tokens] = d_rows.view(-1, *self.latents.shape[1:])
        self.d_weight.add_product(error.t(), weighted(self.rows, row_weights))

    def close(self, group: Tokens) -> None:
        """Ends a group."""

    def gradients(self) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """The gradients of the latents' tensors, and that of the weight; `None` where not wanted."""
        return (self.d_latents,), self.d_weight.result()

    def component_logits(self, tokens: slice) -> Tensor:
        """Equivalent to: `cap(latents[tokens] @ weight.T + bias)` (n, K, V), without groups and gradients."""
        latents = self.latents[tokens]
        logits = self.decoder.logits(latents.flatten(0, 1))
        self.cap(logits, None)
        return logits.unflatten(0, latents.shape[:2])


class SubspaceProjection(Projection):
    """`component_logits_k = hidden_states @ weight.T + shifts_k @ (weight @ basis).T`: one wide product for all K.

    A group of tokens shares the wide products. `open` makes their shared logits; chunk by chunk, `backward` replaces
    these by the errors, summed over the mixture; `close` makes the gradients of the sums.
    """

    shared_share = 0.5

    def __init__(
        self,
        hidden_states: Tensor,
        shifts: Tensor,
        basis: Tensor,
        log_prior: Tensor,
        decoder: DecoderUse,
        wanted: Wanted,
    ) -> None:
        self.hidden_states, self.shifts, self.basis = hidden_states, shifts, basis
        self.decoder, self.weight = decoder, decoder.weight
        self.log_prior = self.log_weights = log_prior
        self.narrow_weight = multiply(self.weight, basis.t())  # (V, R), once per step
        wants_hidden, wants_shifts, self.wants_basis = wanted.latents
        self.d_hidden = torch.zeros_like(hidden_states) if wants_hidden else None
        self.d_shifts = torch.zeros_like(shifts) if wants_shifts else None
        self.wants_shared = wants_hidden or wanted.weight
        self.d_weight = Accumulator(self.weight, wanted.weight, decoder.sum_dtype)
        # Column by column: at R = 8 MKL adds such a product in a third to a tenth of the time.
        by_column = self.weight.new_empty(self.narrow_weight.t().shape).t()
        self.d_narrow_weight = Accumulator(by_column, wanted.weight or self.wants_basis, decoder.sum_dtype)
        self.buffer = self.weight[:0]

    def open(self, group: Tokens, size: int) -> None:
        if self.buffer.shape[0] < size:
            self.buffer = self.weight.new_empty(size, self.weight.shape[0])
        self.group_rows = self.hidden_states[group]
        self.shared = self.buffer[: self.group_rows.shape[0]]
        write_product(self.group_rows, self.weight, self.decoder.bias, self.shared, self.shared)

    def logits(self, tokens: Tokens, place: slice, out: Tensor, half: Tensor | None, slope: Tensor | None) -> None:
        shifts = self.shifts[tokens]
        self.rows = shifts.flatten(0, 1)
        write_product(self.rows, self.narrow_weight, None, out, half)
        out.view(*shifts.shape[:2], -1).add_(self.shared[place].unsqueeze(1))
        self.cap(out, slope)

    def backward(self, tokens: Tokens, place: slice, error: Tensor, row_weights: Tensor | None) -> None:
        K = self.shifts.shape[1]
        if self.d_shifts is not None:
            d_rows = weighted(multiply(error, self.narrow_weight.t()), row_weights)
            self.d_shifts[tokens] = d_rows.view(-1, *self.shifts.shape[1:])
        self.d_narrow_weight.add_product(error.t(), weighted(self.rows, row_weights))
        if not self.wants_shared:
            return
        by_token, summed = error.unflatten(0, (-1, K)), self.shared[place]
        if row_weights is None:
            torch.sum(by_token, dim=1, out=summed)
        else:
            torch.bmm(row_weights.view(-1, 1, K), by_token, out=summed.unsqueeze(1))

    def close(self, group: Tokens) -> None:
        if self.d_hidden is not None:
            self.d_hidden[group] = multiply(self.shared, self.weight.t())
        self.d_weight.add_product(self.shared.t(), self.group_rows)

    def gradients(self) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        d_weight, d_basis = self.d_weight.result(), None
        if (d_narrow := self.d_narrow_weight.result()) is not None:
            d_basis = through_basis(d_narrow, d_weight, self.weight, self.basis, self.wants_basis)
        return (self.d_hidden, self.d_shifts, d_basis), d_weight

    def component_logits(self, tokens: slice) -> Tensor:
        shifts = self.shifts[tokens]
        shared = self.decoder.logits(self.hidden_states[tokens])
        logits = widen(multiply(shifts.flatten(0, 1), self.narrow_weight)).unflatten(0, shifts.shape[:2])
        logits.add_(shared.unsqueeze(1))
        self.cap(logits, None)
        return logits


def through_basis(
    d_narrow: Tensor, d_weight: Tensor | None, weight: Tensor, basis: Tensor, wants_basis: bool
) -> Tensor | None:
    """The gradient of the basis from that of `weight @ basis` (V, R); adds that of the weight to `d_weight`."""
    if d_weight is not None:
        add_product_(d_weight, d_narrow, basis.t().to(d_narrow.dtype), is_first=False)
    return weight.t().to(d_narrow.dtype) @ d_narrow if wants_basis else None


class Accumulator:
    """A gradient (V, E) that the products of all chunks add to; absent where it is not wanted."""

    def __init__(self, like: Tensor, wanted: bool, sum_dtype: torch.dtype) -> None:
        self.total = torch.empty_like(like, dtype=sum_dtype) if wanted else None
        self.is_empty = True

    def add_product(self, left: Tensor, right: Tensor) -> None:
        if self.total is None:
            return
        if left.dtype == self.total.dtype:
            add_product_(self.total, left, right, is_first=self.is_empty)
        elif self.is_empty:
            self.total.copy_(torch.mm(left, right))
        else:
            self.total.add_(torch.mm(left, right))
        self.is_empty = False

    def add_rows(self, classes: Tensor, rows: Tensor) -> None:
        """Adds each of the rows (m, E) to the row of its class."""
        if self.total is None:
            return
        if self.is_empty:
            self.total.zero_()
        self.total.index_add_(0, classes, rows.to(self.total.dtype))
        self.is_empty = False

    def result(self) -> Tensor | None:
        if self.total is not None and self.is_empty:
            self.total.zero_()
        return self.total


def write_product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, half: Tensor | None) -> None:
    """Equivalent to: `out.copy_(F.linear(rows, weight, bias))`, by way of `half` where `rows` are half precision."""
    product = multiply_into(out if half is None or rows.dtype == out.dtype else half, rows, weight, bias)
    if product is not out:
        out.copy_(product)


def weighted(rows: Tensor, row_weights: Tensor | None) -> Tensor:
    return rows if row_weights is None else rows * row_weights
