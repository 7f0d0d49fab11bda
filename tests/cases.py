"""Cases of parametrised tests, of which only some run every time."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(*values: Iterable[Any], quick: Collection[tuple[Any, ...]]) -> list[Any]:
    """Every combination of the values. Those that are not quick are marked slow.

    A quick one takes each path of our own code; a slow one repeats it with another backbone.
    """
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if case in quick else pytest.mark.slow)
        for case in itertools.product(*values)
    ]
