"""How the tokens of a batch are split into chunks, and the buffers that all chunks reuse."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .mos_projections import Tokens

# Working memory of the loss. Each chunk reads the decoder once for each matmul, and reads and writes the decoder's
# whole gradient, if that is wanted. A chunk of n rows moves about 4 n V + 16 V E bytes and computes 6 n V E
# operations, so n has to be large: 30 MiB are 156 rows at V = 50257. In place of 12 MiB they took 0.82 (E = 256, V =
# 32000) and 0.81 (E = 768, V = 50257) of the time with a trained decoder, 0.86 and 0.78 with a frozen one, on an AMD
# EPYC of family 26. More than 32 MiB gain at most 3 %, and glibc no longer keeps such a buffer for the next step, but
# maps new pages: at V = 2048 44 MiB took 1.8 times as long. On an accelerator larger matmuls keep more of it busy, so
# the budget follows its memory.
CPU_BUDGET_BYTES = 30 * 2**20
# With a trained decoder, 128 rows of logits in fp32 are the budget where 30 MiB are fewer: there the gradient's
# traffic costs more than new pages do. They took 0.86 of the time of 30 MiB at E = 256, V = 128000, 0.80 at E = 1024,
# V = 128000, and 0.69 at E = 256, V = 262144 on the same machine; 256 rows gain another 1 to 7 % for twice the memory.
# At most four times the budget, 120 MiB.
TRAINED_DECODER_ROWS, TRAINED_DECODER_BUDGETS = 128, 4
# At least so many rows of component logits, however many bytes each needs.
MIN_ROWS = 32
MIN_BUDGET_BYTES = 256 * 2**20
DEVICE_MEMORY_SHARE = 1 / 64
AUTOGRAD_BYTES_PER_LOGIT = 24  # of the readable maths


class ChunkBuffers(NamedTuple):
    """The buffers (size * K, V) that chunks of `size` tokens share, as large as the budget allows."""

    size: int  # tokens in a chunk
    group_size: int  # tokens that share the wide products of a projection
    logits: Tensor  # in sum_dtype
    half: Tensor | None  # their copy in work_dtype, if that is narrower
    slope: Tensor | None  # the derivative of a softcap, if there is one

    @classmethod
    def allocate(
        cls,
        num_tokens: int,
        num_mixtures: int,
        num_classes: int,
        like: Tensor,
        sum_dtype: torch.dtype,
        has_slope: bool,
        trains_decoder: bool,
        shared_share: float,
        chunk_size: int | None,
    ) -> "ChunkBuffers":
        """Splits the tokens; `chunk_size=None` puts as many into a chunk as the budget allows.

        `num_classes` is V: processes that shard the vocabulary split the tokens alike. `like` is the decoder's weight,
        in work_dtype, with a row for each class that this process holds.
        """
        work_dtype, device = like.dtype, like.device
        has_half, budget = work_dtype != sum_dtype, budget_bytes(device)
        if trains_decoder:
            wanted = TRAINED_DECODER_ROWS * num_classes * torch.float32.itemsize
            budget = min(max(budget, wanted), TRAINED_DECODER_BUDGETS * budget)
        size = chunk_size
        if size is None:
            bytes_per_logit = sum_dtype.itemsize * (1 + has_slope) + work_dtype.itemsize * has_half
            size = max(MIN_ROWS, int(budget * (1 - shared_share)) // (num_classes * bytes_per_logit)) // num_mixtures
        group_size = num_tokens
        if shared_share:
            rows = max(MIN_ROWS, int(budget * shared_share) // (num_classes * work_dtype.itemsize))
            group_size = max(rows, size)
        group_size = even(num_tokens, group_size)
        size = even(group_size, size)

        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty(size * num_mixtures, like.shape[0], dtype=dtype, device=device)

        half, slope = empty(work_dtype) if has_half else None, empty(sum_dtype) if has_slope else None
        return cls(size, group_size, empty(sum_dtype), half, slope)

    def rows(self, count: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The first rows of the logits, their copy, and their slope."""
        half, slope = (None if buffer is None else buffer[:count] for buffer in (self.half, self.slope))
        return self.logits[:count], half, slope


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
