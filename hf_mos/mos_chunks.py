"""One pass over the tokens, a chunk at a time: each token's loss, and the gradients of their weighted sum.

    N tokens, n of them in a chunk, K mixtures, V classes
    component_nll    = logsumexp_V(component_logits) - component_logits[target]        (n, K)
    nll              = -logsumexp_K(log_prior - component_nll)                         (n,)
    responsibilities = softmax_K(log_prior - component_nll)                            (n, K)
    d component_logits = responsibilities_k * (softmax(component_logits_k) - onehot)   (n, K, V), never stored whole
    d prior_logits     = softmax(prior_logits) - responsibilities                      (n, K)

The gradients of a chunk need nothing that its own forward pass has not made, in one reused buffer of (n K, V).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mos_latents import SubspaceLatents
from .mos_log_probs import widen
from .mos_projections import Tokens, projection_for
from .mos_vocabulary import VocabularyShard, WholeVocabulary

# Working memory of the loss. On the CPU a chunk that stays in the cache is the fastest; on an accelerator larger
# products keep more of it busy, so the budget follows its memory.
CPU_BUDGET_BYTES = 12 * 2**20
# Rows of component logits at least, however large the vocabulary: each chunk reads and writes the decoder's gradient.
MIN_ROWS = 32
MIN_BUDGET_BYTES = 256 * 2**20
DEVICE_MEMORY_SHARE = 1 / 64


class LossOptions(NamedTuple):
    softcap: float | None
    ignore_index: int
    chunk_size: int | None
    work_dtype: torch.dtype  # of the products
    shard: VocabularyShard | None = None  # of which the decoder's rows are; `None`: they are all


@torch.no_grad()
def loss_and_gradients(
    tensors: tuple[Any, ...],
    options: LossOptions,
    wanted: tuple[bool, ...] = (False,) * 6,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Each token's nll (N,), and the gradients of their sum, weighted by `token_weights` (N,) if there are any."""
    prior_logits, decoder_weight, bias, targets, *latent_tensors = tensors
    work_dtype = options.work_dtype
    wants_prior, wants_weight, wants_bias, *wants_latents = wanted
    wants_logits = any(wanted[1:])  # whether the gradient has to pass through the component logits
    (N, K), V, device = prior_logits.shape, decoder_weight.shape[0], prior_logits.device
    vocabulary = WholeVocabulary(V) if options.shard is None else options.shard
    sum_dtype = widen(latent_tensors[0][:0]).dtype
    with torch.autocast(device.type, enabled=False):
        cast = [tensor.to(work_dtype) for tensor in latent_tensors]
        latents = cast[0] if len(cast) == 1 else SubspaceLatents(*cast)
        weight = decoder_weight.to(work_dtype)
        projection = projection_for(latents, weight, tuple(wants_latents), wants_weight, sum_dtype)
        bias = None if bias is None else bias.to(work_dtype)
        log_prior = F.log_softmax(prior_logits.to(sum_dtype), dim=-1)
        nll = torch.zeros(N, dtype=sum_dtype, device=device)
        d_prior = torch.zeros_like(log_prior) if wants_prior else None
        d_bias = torch.zeros(V, dtype=sum_dtype, device=device) if wants_bias else None

        buffers = ChunkBuffers(V, vocabulary.num_classes, options, sum_dtype, device, wants_logits)
        kept = (targets != options.ignore_index).nonzero().squeeze(1)
        size, group_size = buffers.allocate(kept.shape[0], K, projection.shared_share)
        for group in split(kept, group_size, of=N):
            projection.open(group, group_size, bias)
            for tokens, place in split_again(group, size):
                target_rows = targets[tokens].long().repeat_interleave(K).unsqueeze(1)  # (n K, 1)
                logits, half, slope = buffers.rows(target_rows.shape[0])  # (n K, V) each
                projection.logits(tokens, place, logits, half)
                if options.softcap is not None:
                    cap_(logits, options.softcap, slope)
                component_nll = vocabulary.softmax_(logits, target_rows).view(-1, K)
                log_joint = log_prior[tokens] - component_nll
                chunk_nll = -torch.logsumexp(log_joint, dim=-1, keepdim=True)
                nll[tokens] = chunk_nll.squeeze(1)
                responsibilities = torch.exp(log_joint + chunk_nll)  # (n, K)
                token_weight = 1.0 if token_weights is None else token_weights[tokens].to(sum_dtype).unsqueeze(1)
                if d_prior is not None:
                    d_prior[tokens] = (log_prior[tokens].exp() - responsibilities) * token_weight
                if not wants_logits:
                    continue
                error = vocabulary.subtract_targets_(logits, target_rows)
                if slope is not None:
                    error.mul_(slope)
                row_weights = (responsibilities * token_weight).view(-1, 1)  # (n K, 1)
                if d_bias is not None:
                    d_bias.addmv_(error.t(), row_weights.squeeze(1))
                if work_dtype == sum_dtype:
                    projection.backward(tokens, place, error, row_weights)
                else:
                    projection.backward(tokens, place, torch.mul(error, row_weights, out=half), None)
            if wants_logits:
                projection.close(group)
        d_latents, d_weight = projection.gradients()
        for gradient in d_latents:
            vocabulary.sum_(gradient)
        return nll, (d_prior, d_weight, d_bias, *d_latents)


class ChunkBuffers:
    """The reused buffers of (chunk_size * K, V), as large as the budget allows."""

    def __init__(
        self,
        num_classes: int,
        all_classes: int,
        options: LossOptions,
        sum_dtype: torch.dtype,
        device: torch.device,
        wants_logits: bool,
    ) -> None:
        # Processes that share the vocabulary share each chunk, and not all of them hold as many classes.
        self.num_classes, self.all_classes = num_classes, all_classes
        self.chunk_size, self.device = options.chunk_size, device
        self.work_dtype, self.sum_dtype = options.work_dtype, sum_dtype
        self.has_half = self.work_dtype != sum_dtype
        self.has_slope = options.softcap is not None and wants_logits
        self.logits = self.half = torch.empty(0)
        self.slope: Tensor | None = None

    def allocate(self, num_tokens: int, num_mixtures: int, shared_share: float) -> tuple[int, int]:
        """Makes the buffers; returns how many tokens are in work at a time, and how many share the wide products."""
        bytes_per_logit = self.sum_dtype.itemsize * (1 + self.has_slope) + self.work_dtype.itemsize * self.has_half
        budget = budget_bytes(self.device)
        size = self.chunk_size
        if size is None:
            rows = max(MIN_ROWS, int(budget * (1 - shared_share)) // (self.all_classes * bytes_per_logit))
            size = rows // num_mixtures
        group_size = num_tokens
        if shared_share:
            rows = max(MIN_ROWS, int(budget * shared_share) // (self.all_classes * self.work_dtype.itemsize))
            group_size = max(rows, size)
        group_size = even(num_tokens, group_size)
        size = even(group_size, size)
        shape = (size * num_mixtures, self.num_classes)
        self.logits = torch.empty(shape, dtype=self.sum_dtype, device=self.device)
        if self.has_half:
            self.half = torch.empty(shape, dtype=self.work_dtype, device=self.device)
        if self.has_slope:
            self.slope = torch.empty(shape, dtype=self.sum_dtype, device=self.device)
        return size, group_size

    def rows(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.logits[:count], self.half[:count], None if self.slope is None else self.slope[:count]


def even(count: int, size: int) -> int:
    """The size of parts of at most `size` that share `count` evenly, so that none is a small rest."""
    count, size = max(1, count), max(1, size)
    return -(-count // -(-count // size))


def split(kept: Tensor, size: int, of: int) -> Iterator[Tokens]:
    """The kept tokens in parts: slices where all `of` them are kept, else index tensors."""
    count = kept.shape[0]
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop) if count == of else kept[start:stop]


def split_again(group: Tokens, size: int) -> Iterator[tuple[Tokens, slice]]:
    """The tokens of a group in parts, and each part's place in the group."""
    count = group.stop - group.start if isinstance(group, slice) else group.shape[0]
    for start in range(0, count, size):
        place = slice(start, min(start + size, count))
        if isinstance(group, slice):
            yield slice(group.start + place.start, group.start + place.stop), place
        else:
            yield group[place], place


def cap_(logits: Tensor, softcap: float, slope: Tensor | None) -> None:
    """Equivalent to: `cap_logits` in place; writes its derivative at each logit to `slope`, if there is one."""
    logits.div_(softcap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1)
    logits.mul_(softcap)


def budget_bytes(device: torch.device) -> int:
    """Working memory for one chunk, in bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return max(MIN_BUDGET_BYTES, int(total * DEVICE_MEMORY_SHARE))
    return CPU_BUDGET_BYTES


def tokens_per_chunk(num_mixtures: int, num_classes: int, bytes_per_logit: int, device: torch.device) -> int:
    """How many tokens' component logits fit in the budget."""
    rows = max(MIN_ROWS, budget_bytes(device) // (num_classes * bytes_per_logit))
    return max(1, rows // num_mixtures)
