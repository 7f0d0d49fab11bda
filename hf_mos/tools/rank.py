"""Measures the rank of a model's log-probability matrix over contexts, which one softmax bounds.

    N contexts, V vocabulary, D the width of the hidden state that the head reads
    log_probs (N, V)    one softmax: rank at most D + 1, however many contexts; a mixture of softmaxes: no such bound

Source: Yang et al. 2018, arXiv 1711.03953, sections 2.2 and 3.4 (the rank of the matrix, and its measurement).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class LogProbRank(NamedTuple):
    """The numerical rank of a log-probability matrix, with its tolerance and singular values."""

    rank: int  # the number of singular values above `tolerance` times the largest
    tolerance: float  # relative to the largest singular value
    singular_values: Tensor  # (min(N, V),), float64, largest first

    def at(self, tolerance: float) -> int:
        """The rank under another relative tolerance."""
        return int((self.singular_values > tolerance * self.singular_values[0]).sum())


def log_prob_rank(log_probs: Tensor, tolerance: float | None = None) -> LogProbRank:
    """Equivalent to: `torch.linalg.matrix_rank(log_probs.double(), rtol=tolerance)`, with the singular values.

    Args:
        log_probs: (N, V), natural log-probabilities of N contexts, in float64 unless `tolerance` is given: rounding
            to fp32 is noise of full rank.
        tolerance: singular values above this share of the largest count. `None`: `max(N, V)` times float64's epsilon,
            as in `torch.linalg.matrix_rank`; 2e-12 for V = 10,000.

    Raises:
        ValueError: not a matrix of finite numbers, or fp32 without a tolerance.
    """
    if log_probs.dim() != 2 or log_probs.numel() == 0:
        raise ValueError(f"log_probs: expected (N, V), given {tuple(log_probs.shape)}")
    if tolerance is None:
        if log_probs.dtype != torch.float64:
            raise ValueError(f"log_probs: expected torch.float64, or a tolerance, given {log_probs.dtype}")
        tolerance = max(log_probs.shape) * torch.finfo(torch.float64).eps
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a number in [0, 1), given {tolerance}")
    if not log_probs.isfinite().all():
        raise ValueError("log_probs: expected finite numbers, given some that are not")
    singular_values = torch.linalg.svdvals(log_probs.double())
    return LogProbRank(int((singular_values > tolerance * singular_values[0]).sum()), tolerance, singular_values)


@torch.no_grad()
def log_prob_matrix(model: PreTrainedModel, input_ids: Tensor, max_contexts: int | None = None) -> Tensor:
    """Equivalent to: `log_softmax(model(input_ids).logits).flatten(0, 1)[:max_contexts]`, the head in float64.

    The hidden states keep the model's dtype; the head, and what the architecture does to its logits, run in float64,
    as the rank of the matrix that the head makes of them is what the bottleneck is about.

    Args:
        model: a causal LM, with a mixture or without, on any device.
        input_ids: (rows, sequence). Each position is a context. No padding, which would be contexts too.
        max_contexts: N, at most. Choose it far above D + 1, else N bounds the rank. `None`: all positions.

    Returns:
        (N, V), natural log-probabilities, float64, on the CPU.

    Raises:
        ValueError: the shapes do not fit, or the architecture changes its logits in fp32.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids: expected (rows, sequence), given {tuple(input_ids.shape)}")
    if max_contexts is not None and max_contexts < 1:
        raise ValueError(f"max_contexts: expected at least 1, given {max_contexts}")
    was_training = model.training
    model.eval()
    wanted = min(max_contexts or input_ids.numel(), input_ids.numel())
    parts: list[Tensor] = []
    with head_in_float64(model) as head_outputs:
        for row in input_ids.to(model.device).split(1):
            logits = unrounded(model(input_ids=row).logits, head_outputs.pop())
            parts.append(logits[0, : wanted - sum(map(len, parts))].log_softmax(-1).cpu())
            if sum(map(len, parts)) == wanted:
                break
    model.train(was_training)
    return torch.cat(parts)


def unrounded(logits: Tensor, head_output: Tensor) -> Tensor:
    """The logits in float64. If the architecture only rounds the output of its head, this output."""
    if logits.dtype == torch.float64:
        return logits
    if not torch.equal(head_output.to(logits.dtype), logits):
        raise ValueError(f"model: expected logits in float64 as its head makes them, given {logits.dtype}")
    return head_output


@contextmanager
def head_in_float64(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Lets the head compute in float64 without a change of its weights; yields the list of its outputs."""
    head: Any = model.get_output_embeddings()
    outputs: list[Tensor] = []
    wide = copy.deepcopy(head).double()

    def compute(module: nn.Module, inputs: tuple[Any, ...], narrow: Any) -> Tensor:
        outputs.append(wide(inputs[0].double()))
        return outputs[-1]

    hook = head.register_forward_hook(compute)
    try:
        yield outputs
    finally:
        hook.remove()
