"""Matrix products by the library that is the fastest for them."""

import functools
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as all_modules
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
ENGINES = ("torch.distributed.fsdp.", "deepspeed.")  # modules whose hooks gather a weight
MODULE_TRACKER = "torch.utils.module_tracker"  # FlopCounterMode's: it notes which module runs, and reads no tensor
FEW_ROWS, SMALL = range(4, 17), 2**23  # multiplications; oneDNN takes 30 to 100 microseconds before it begins
COLUMNS, COLUMN_HEIGHT = 4, 1024  # rows, and their width, at most that MKL multiplies faster as columns
NARROW, TILE = 32, 1024  # columns of a product; classes at a time, so that a tile of logits stays in the cache


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Equivalent to: `F.linear(rows, weight, bias)`, which is `rows @ weight.T + bias`, without gradients.

    Shapes: rows (n, D), weight (V, D), bias (V,), result (n, V), all of one dtype. By MKL or oneDNN; the processor's
    vendor decides, so that a run repeats to the bit. On AMD MKL refuses its fast paths and takes twice the time, but
    not for 2 to 4 rows as columns, up to D = 1024. On Intel oneDNN takes 0.4 to 0.9 of MKL's time at 4 to 16 rows.
    """
    if not _suits_onednn(rows, weight):
        return F.linear(rows, weight, bias)
    if _mkl_is_slow() and 2 <= rows.shape[0] <= COLUMNS and rows.shape[1] <= COLUMN_HEIGHT:
        columns = torch.mm(weight, rows.t())
        return (columns if bias is None else columns.add_(bias.unsqueeze(1))).t().contiguous()
    return _onednn(rows, weight, bias)


def multiply_into(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Equivalent to: `out.copy_(multiply(rows, weight, bias))`, without memory of the size of `out`; returns `out`."""
    if weight.is_contiguous() and _suits_onednn(rows, weight):  # contiguous, so that a tile has no gaps either
        for start in range(0, weight.shape[0], TILE):  # oneDNN returns a tensor of its own
            tile = slice(start, start + TILE)
            out[:, tile] = _onednn(rows, weight[tile], None if bias is None else bias[tile])
        return out
    return torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """Equivalent to: `total.addmm_(left, right, beta=0 if is_first else 1)`.

    Shapes: total (V, D), left (V, n), right (n, D), all of one dtype. Tile by tile oneDNN takes 0.55 to 0.9 of MKL's
    time (D of 64 to 4096, family 26). For 32 columns and fewer, and on family 25 (0.55 to 0.95), MKL is faster.
    """
    if right.shape[1] > NARROW and _mkl_is_slow(adds=True) and _suits_onednn(left, right):
        for start in range(0, left.shape[0], TILE):
            tile = slice(start, start + TILE)
            rows = left[tile] if left.is_contiguous() else left[tile].t().contiguous().t()  # no gaps: 7 ms for 40
            product = _onednn(rows, right.t(), None)
            total[tile].copy_(product) if is_first else total[tile].add_(product)
    else:
        torch.addmm(total, left, right, beta=0 if is_first else 1, out=total)  # FlopCounterMode knows no addmm_


class Accumulator:
    """A gradient (V, D) that the products of all chunks add to; absent where it is not wanted."""

    def __init__(self, like: Tensor, wanted: bool, sum_dtype: torch.dtype) -> None:
        self.total = torch.empty_like(like, dtype=sum_dtype) if wanted else None
        self.is_empty = True

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Adds `left @ right`; left (V, n), right (n, D)."""
        if self.total is None:
            return
        if left.dtype == self.total.dtype:
            add_product_(self.total, left, right, is_first=self.is_empty)
        else:
            product = torch.mm(left, right)
            self.total.copy_(product) if self.is_empty else self.total.add_(product)
        self.is_empty = False

    def add_rows(self, classes: Tensor, rows: Tensor) -> None:
        """Adds each of the rows (m, D) to the row of its class."""
        if self.total is None:
            return
        if self.is_empty:
            self.total.zero_()
        self.total.index_add_(0, classes, rows.to(self.total.dtype))
        self.is_empty = False

    def result(self) -> Tensor | None:
        return self.total.zero_() if self.total is not None and self.is_empty else self.total


def project(projection: Any, hidden_states: Tensor) -> Tensor:
    """Equivalent to: `projection(hidden_states)`; by the faster product if nothing records the operations."""
    is_small = type(projection) is nn.Linear and hidden_states.numel() * projection.out_features < SMALL
    if is_small or is_recorded() or is_transformed() or not is_bare(projection):
        return projection(hidden_states)
    outputs = multiply(hidden_states.flatten(0, -2), projection.weight, projection.bias)
    return outputs.unflatten(0, hidden_states.shape[:-1])


def is_bare(projection: Any) -> bool:
    """Whether its weight does all that a call of a linear layer does."""
    reads = type(projection) is nn.Linear and is_plain(projection.weight) and "forward" not in vars(projection)
    return reads and not hasattr(projection, "_hf_hook") and not _hooks_of(projection)  # the former is accelerate's


def is_plain(weight: Any) -> bool:
    """Whether a weight is a tensor like any other: not sharded, and not a quantizer's."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for a call of the module: a hook, or a forward of its own.

    Those of the engines that gather or load weights (FSDP2, ZeRO-3, accelerate) do not count.
    """
    owners = [getattr(hook, "__module__", None) or "" for hook in _hooks_of(module)]
    has_own_forward = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    return has_own_forward or not all(owner.startswith(ENGINES) for owner in owners)


def _hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of any kind that are called with a module, its own and those of all modules."""
    found = [hook for kind in HOOKS for hook in getattr(module, f"_{kind}").values()]
    if _has_any_global_hook():
        everybodys = (hook for kind in HOOKS for hook in getattr(all_modules, f"_global_{kind}").values())
        found += [hook for hook in everybodys if getattr(hook, "__module__", None) != MODULE_TRACKER]
    return found


def is_recorded() -> bool:
    """Whether autograd or torch.compile records the operations, which then write to no tensor in place."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether torch.func, forward-mode derivatives or `torch.jit.trace` follow every operation: our loops wrongly."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or torch.jit.is_tracing())


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _suits_onednn(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is there, the faster one, and takes the matrices on a fast path: fp32, and no gaps in them."""
    return (
        rows.shape[0] * weight.numel() >= SMALL
        and (_mkl_is_slow() or rows.shape[0] in FEW_ROWS)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and (torch.compiler.is_compiling() or _get_current_dispatch_mode() is None)  # FlopCounterMode knows torch's
        and (rows.is_cpu and weight.is_cpu and rows.dtype == weight.dtype == torch.float32)
        and (rows.is_contiguous() or rows.t().is_contiguous())
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )


@functools.cache
def _mkl_is_slow(adds: bool = False) -> bool:
    """Whether torch's BLAS is MKL on a processor of AMD, for a product that it adds up or for others."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    is_slow = torch.backends.mkl.is_available() and "AuthenticAMD" in text
    return is_slow and not (adds and re.search(r"cpu family\s*: 25\b", text))
