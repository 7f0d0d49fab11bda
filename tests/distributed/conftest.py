"""The engines of `make test-distributed`, each on two processes of this machine; the helpers of the other tests.

Plain pytest does not import these files.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr == "not slow" else None
