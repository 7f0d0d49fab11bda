"""Runs the `hf-mos` command in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fresh_processes import PROGRAMS, fork_server


def run_command(*arguments: Any, cache: Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `hf-mos` with the arguments in a fresh process.

    With other variables, which libraries read when they are imported, it is one that has imported nothing yet.
    """
    if not variables:
        process = fork_server(*PROGRAMS).run(
            "hf_mos.tools.cli",
            *arguments,
            kind="module",
            cwd=cache,
            environment={"HF_HOME": str(cache), "COLUMNS": "200"},
        )
        assert process.returncode == code, process.stdout + process.stderr
        return process
    environment = os.environ | {"HF_HOME": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "hf_mos.tools.cli", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache, timeout=240)
    assert process.returncode == code, process.stdout + process.stderr
    return process
