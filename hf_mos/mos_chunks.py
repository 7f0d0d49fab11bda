"""How the tokens of a batch are split into chunks, and the buffers that all chunks reuse."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .mos_projections import Tokens

# Working memory of the loss. On the CPU a chunk that stays in the cache is the fastest; on an accelerator larger
# matmuls keep more of it busy, so the budget follows its memory.
CPU_BUDGET_BYTES = 12 * 2**20
# At least so many rows of component logits, however large the vocabulary: each chunk reads and writes the decoder's
# gradient.
MIN_ROWS = 32
MIN_BUDGET_BYTES = 256 * 2**20
DEVICE_MEMORY_SHARE = 1 / 64


class ChunkBuffers:
    """The reused buffers of (chunk_size * K, V), as large as the budget allows.

    Args:
        num_classes: the classes whose logits this process holds.
        all_classes: V. Processes that shard the vocabulary split the tokens alike, though their shards differ in size.
        chunk_size: tokens in a chunk; `None`: as many as the budget allows.
        work_dtype: of the matmuls.
        sum_dtype: of the softmax and of sums.
        has_slope: whether the derivative of a softcap is kept.
        device: of the buffers.
    """

    def __init__(
        self,
        num_classes: int,
        all_classes: int,
        chunk_size: int | None,
        work_dtype: torch.dtype,
        sum_dtype: torch.dtype,
        has_slope: bool,
        device: torch.device,
    ) -> None:
        self.num_classes, self.all_classes = num_classes, all_classes
        self.chunk_size, self.device = chunk_size, device
        self.work_dtype, self.sum_dtype = work_dtype, sum_dtype
        self.has_half, self.has_slope = work_dtype != sum_dtype, has_slope
        self.logits = self.half = torch.empty(0)
        self.slope: Tensor | None = None

    def allocate(self, num_tokens: int, num_mixtures: int, shared_share: float) -> tuple[int, int]:
        """Makes the buffers; returns the number of tokens in a chunk, and in a group that shares wide products."""
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
        """The first rows of the logits, of their copy in half precision, and of the softcap's derivative."""
        return self.logits[:count], self.half[:count], None if self.slope is None else self.slope[:count]


def even(count: int, size: int) -> int:
    """The size of parts of at most `size` that split `count` evenly, so that no small rest remains."""
    count, size = max(1, count), max(1, size)
    return -(-count // -(-count // size))


def split(kept: Tensor, size: int, of: int) -> Iterator[Tokens]:
    """Splits the kept tokens into parts: slices where all `of` tokens are kept, else index tensors."""
    count = kept.shape[0]
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop) if count == of else kept[start:stop]


def split_again(group: Tokens, size: int) -> Iterator[tuple[Tokens, slice]]:
    """Splits the tokens of a group into parts, and gives each part's place in the group."""
    count = group.stop - group.start if isinstance(group, slice) else group.shape[0]
    for start in range(0, count, size):
        place = slice(start, min(start + size, count))
        if isinstance(group, slice):
            yield slice(group.start + place.start, group.start + place.stop), place
        else:
            yield group[place], place


def budget_bytes(device: torch.device) -> int:
    """Working memory for one chunk, in bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return max(MIN_BUDGET_BYTES, int(total * DEVICE_MEMORY_SHARE))
    return CPU_BUDGET_BYTES


def tokens_per_chunk(num_mixtures: int, num_classes: int, bytes_per_logit: int, device: torch.device) -> int:
    """The number of tokens whose component logits fit into the budget."""
    rows = max(MIN_ROWS, budget_bytes(device) // (num_classes * bytes_per_logit))
    return max(1, rows // num_mixtures)
