"""Runs the `hf-mos` command in a fresh process."""

import subprocess
from pathlib import Path
from typing import Any

from fresh_processes import PROGRAMS, ForkServer, fork_server


def run_command(*arguments: Any, cache: Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `hf-mos` with the arguments in a fresh process."""
    process = server_with(*PROGRAMS, **variables).run(
        "hf_mos.tools.cli",
        *arguments,
        kind="module",
        cwd=cache,
        environment={"HF_HOME": str(cache), "COLUMNS": "200", **variables},
    )
    assert process.returncode == code, process.stdout + process.stderr
    return process


def server_with(*modules: str, **variables: str) -> ForkServer:
    """A server that has imported the modules with the variables. The token, which is read at each use, is not one."""
    return fork_server(*modules, **{name: value for name, value in variables.items() if name != "HF_TOKEN"})
