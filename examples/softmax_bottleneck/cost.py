"""The cost of a training step per token: counted operations and measured seconds.

The operations are the multiplications and additions of the matrix products of forward and backward, as torch's own
counter sees them run. The seconds are the processor's, of one thread, the median over rounds in which each model takes
a step in turn, so that a slow moment of the machine hits all.
"""

import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import track
from text import inputs_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training import Recipe, make_optimizer, take_step
from transformers import PreTrainedModel


def operations(model: PreTrainedModel, batch: Tensor, recipe: Recipe) -> float:
    """The operations of a training step, per token.

    The counter does not know the products of queries with keys on the CPU: a few per cent, the same for every head.
    """
    optimizer = make_optimizer(model, recipe)
    with FlopCounterMode(display=False) as counter:
        take_step(model, inputs_of(batch), optimizer, 1.0)
    return counter.get_total_flops() / batch.numel()


def seconds_in_turn(
    makers: dict[str, Callable[[], PreTrainedModel]], batch: Tensor, recipe: Recipe, rounds: int
) -> dict[str, float]:
    """Measures the seconds of a training step per token of each model; one model is in memory at a time."""
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in track(range(rounds), description="timing", console=Console(stderr=True), transient=True):
        for name, make in makers.items():
            model = make()
            optimizer = make_optimizer(model, recipe)
            take_step(model, inputs_of(batch), optimizer, 1.0)  # the first one warms up
            for _ in range(2):
                started = time.process_time()
                take_step(model, inputs_of(batch), optimizer, 1.0)
                seconds[name].append((time.process_time() - started) / batch.numel())
    return {name: statistics.median(values) for name, values in seconds.items()}
