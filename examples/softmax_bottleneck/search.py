"""The search for a learning rate, the same for every head."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Rate = TypeVar("Rate")


def best_rate(rates: Sequence[Rate], nats: Callable[[Rate], float]) -> Rate:
    """The rate with the fewest nats, by a walk from the middle to the better neighbour, as they have one minimum.

    Args:
        nats: trains with a rate; it is called again for a rate that it has been called for, so it keeps its results.
    """

    def is_better(place: int, than: int) -> bool:
        return 0 <= place < len(rates) and nats(rates[place]) < nats(rates[than])

    best = (len(rates) - 1) // 2
    step = 1 if is_better(best + 1, best) else -1
    while is_better(best + step, best):
        best += step
    return rates[best]
