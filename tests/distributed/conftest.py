"""The engines of `make test-distributed`, each on two processes of this machine; the helpers of the other tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
