"""The exit codes: 0 done, 1 the work failed, 2 an argument or option was refused before any work, 130 interrupted.

A check that needs neither the text nor the weights runs `before_work`, so that a wrong option costs no waiting.
"""

import contextlib
from collections.abc import Iterator

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


class OptionError(ValueError):
    """An argument or option of a command that is refused before any work."""


@contextlib.contextmanager
def before_work() -> Iterator[None]:
    """Makes each ValueError an [`OptionError`]."""
    try:
        yield
    except ValueError as error:
        raise OptionError(str(error)) from error
