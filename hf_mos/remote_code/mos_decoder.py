"""The decoder (the vocabulary projection) as the losses use it: its logits, their softmax, the chunks of tokens.

n tokens of a chunk, R rows of logits (n of them, or n K), V classes
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mos_matmul import multiply, multiply_into

Tokens = slice | Tensor  # the tokens of a chunk, as an index

# Working memory of the loss; on an accelerator its memory decides. glibc keeps no buffer of 32 MiB for the next step.
CPU_BUDGET_BYTES = 63 * 2**19  # 31.5 MiB, 256 rows at V = 32000; MKL takes 1.6 times as long a row for 171 (a Xeon)
# A chunk reads and writes a trained decoder's gradient. So 128 rows, up to 126 MiB: 0.86 of the time at V = 128000.
TRAINED_DECODER_ROWS, TRAINED_DECODER_BUDGETS = 128, 4
ROW_BYTES = 2 * 2**20  # took 0.89 of the time of all rows at once (decoding 32 tokens, D = 4096, a Xeon)
MIN_ROWS = 32  # at least so many rows of logits, however many bytes each needs
DEVICE_MEMORY_SHARE, MIN_BUDGET_BYTES = 1 / 64, 256 * 2**20
AUTOGRAD_BYTES_PER_LOGIT = 28  # of the readable maths


class WholeVocabulary(NamedTuple):
    """The softmax over all classes. `hf_mos.training.tensor_parallel` has one over a shard in each process."""

    num_classes: int  # V

    def softmax_(self, logits: Tensor, target_rows: Tensor) -> Tensor:
        """Softmax of the logits (R, V), in place; returns the component_nll of the targets, both (R, 1).

        The logarithm of their sum is read back from the largest probability, which cannot underflow: three passes.
        """
        target_logits, largest = logits.gather(1, target_rows), logits.amax(dim=-1, keepdim=True)
        torch.softmax(logits, dim=-1, out=logits)
        return (largest - target_logits) - logits.amax(dim=-1, keepdim=True).log()

    def log_softmax_(self, logits: Tensor) -> Tensor:
        """Log-softmax of logits (..., V), in place."""
        return torch.log_softmax(logits, dim=-1, out=logits)

    def subtract_targets_(self, probs: Tensor, target_rows: Tensor) -> Tensor:
        """Equivalent to: `probs - onehot(target)`, in place."""
        return probs.scatter_add_(1, target_rows, probs.new_full((), -1.0).expand_as(target_rows))

    def sum_(self, part: Tensor | None) -> None:
        """The part is the whole."""

    def in_shortlist(self, logits: Tensor, size: int) -> Tensor | None:
        """All candidates (n, M) are in the shortlist."""
        return None


class Decoder(NamedTuple):
    """The decoder's tensors in the dtype of the matmuls, and what follows the matmul."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    vocabulary: Any  # WholeVocabulary, or what has its methods for the rows that this process holds
    sum_dtype: torch.dtype  # of the logits, and of gradients that many tokens add to: fp32, or fp64 for fp64
    matmul: Callable[[Tensor], Tensor] | None = None  # in place of our own, in inference
    narrow: Tensor | None = None  # (V, r), the weight times the widening: what offsets (n, K, r) are multiplied with

    def logits(self, rows: Tensor) -> Tensor:
        """Equivalent to: `F.linear(rows, weight, bias)` (R, V), upcast, without gradients."""
        return upcast(multiply(rows, self.weight, self.bias) if self.matmul is None else self.matmul(rows))

    def rows_of(self, classes: Tensor) -> Iterator[tuple[Tokens, Tensor]]:
        """The rows (n, M, D or r) that offsets are multiplied with, of classes (n, M), as many as a cache holds."""
        weight = self.weight if self.narrow is None else self.narrow
        budget = ROW_BYTES if weight.is_cpu else budget_bytes(weight.device)
        size = budget // max(1, classes.shape[1] * weight.shape[1] * weight.itemsize)  # a shard may have no classes
        for part in split(classes, even(len(classes), size), of=len(classes)):
            yield part, F.embedding(classes[part], weight)

    def write_logits(self, rows: Tensor, out: Tensor, half: Tensor | None) -> None:
        """Equivalent to: `out.copy_(logits(rows))`, by way of `half` where `rows` are half precision."""
        product = multiply_into(out if half is None else half, rows, self.weight, self.bias)
        if product is not out:
            out.copy_(product)


class ChunkBuffers(NamedTuple):
    """The buffers that the chunks of tokens share, as large as the budget allows."""

    size: int  # tokens in a chunk
    logits: Tensor  # (size * rows_per_token, V), in sum_dtype
    half: Tensor | None  # their copy in the dtype of the matmuls, if that is narrower
    slope: Tensor | None  # the derivative of a softcap, if there is one

    @classmethod
    def allocate(
        cls, count: int, rows_per_token: int, decoder: Decoder, wants_any: bool, trains_decoder: bool
    ) -> "ChunkBuffers":
        """Makes the buffers for chunks of the `count` tokens, of as many as the budget allows."""
        # V of the whole vocabulary, so that processes that shard it split the tokens alike.
        weight, sum_dtype, V = decoder.weight, decoder.sum_dtype, decoder.vocabulary.num_classes
        work_dtype, device = weight.dtype, weight.device
        has_half, has_slope = work_dtype != sum_dtype, decoder.softcap is not None and wants_any
        bytes_per_logit = sum_dtype.itemsize * (1 + has_slope) + work_dtype.itemsize * has_half
        size = even(count, tokens_per_chunk(rows_per_token, V, bytes_per_logit, device, trains_decoder))

        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty(size * rows_per_token, weight.shape[0], dtype=dtype, device=device)

        half, slope = empty(work_dtype) if has_half else None, empty(sum_dtype) if has_slope else None
        return cls(size, empty(sum_dtype), half, slope)

    def rows(self, count: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The first rows of the logits, their copy, and their slope."""
        half, slope = (None if buffer is None else buffer[:count] for buffer in (self.half, self.slope))
        return self.logits[:count], half, slope


def split(kept: Tensor, size: int, of: int) -> Iterator[Tokens]:
    """Splits the kept tokens into parts: slices where all `of` tokens are kept, else index tensors."""
    count = kept.shape[0]
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop) if count == of else kept[start:stop]


def even(count: int, size: int) -> int:
    """The size of parts of at most `size` that split `count` evenly, so that no small rest remains."""
    count, size = max(1, count), max(1, size)
    return -(-count // -(-count // size))


def budget_bytes(device: torch.device) -> int:
    """Working memory for one chunk, in bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return max(MIN_BUDGET_BYTES, int(total * DEVICE_MEMORY_SHARE))
    return CPU_BUDGET_BYTES


def tokens_per_chunk(
    rows_per_token: int, num_classes: int, bytes_per_logit: int, device: torch.device, trains_decoder: bool = False
) -> int:
    """The number of tokens whose logits fit into the budget."""
    budget = budget_bytes(device)
    if trains_decoder:
        wanted = TRAINED_DECODER_ROWS * num_classes * torch.float32.itemsize
        budget = min(max(budget, wanted), TRAINED_DECODER_BUDGETS * budget)
    rows = max(MIN_ROWS, budget // (num_classes * bytes_per_logit))
    return max(1, rows // rows_per_token)


def upcast(x: Tensor) -> Tensor:
    """Equivalent to: `x.float()`, or `x` itself in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def logsumexp_(joint: Tensor) -> tuple[Tensor, Tensor]:
    """Equivalent to: `torch.logsumexp(joint, dim=1, keepdim=True)`, and the sum that it takes the logarithm of.

    Leaves `exp(joint - largest)` in `joint` (n, K, V). MKL takes 9 times as long for exp_ as for exp2_ (family 25).
    """
    largest = joint.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(joint.dtype).min)  # -inf - -inf would be NaN
    total = joint.sub_(largest).mul_(math.log2(math.e)).exp2_().sum(dim=1, keepdim=True)
    return total.log().add_(largest), total


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Equivalent to: `softcap * tanh(logits / softcap)`; `None` leaves the logits as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cap_(logits: Tensor, softcap: float | None, slope: Tensor | None = None) -> None:
    """Equivalent to: `cap_logits` in place; writes its derivative at each logit to `slope`, if there is one."""
    if softcap is None:
        return
    logits.div_(softcap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1)
    logits.mul_(softcap)
