"""Checks that a fork of a server is what a fresh process would be."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fresh_processes import ForkServer

LIBRARY = """
import os
HOME = os.environ["HF_HOME"] + "/hub"
ENDPOINT = os.environ.get("HF_ENDPOINT")
calls = []
"""
PROGRAM = """
import json, os, sys, warnings
import library
library.calls.append(1)
warnings.warn("old")
absent = "fractions" if sys.argv[1] == "absent" else "json"
__import__(absent)
print(json.dumps([__name__, sys.argv[1:], os.getcwd(), library.HOME, len(library.calls), sys.path[0]]))
"""

# Waits for the file of the other process.
MEET = """
import os, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
Path(sys.argv[1], str(rank)).touch()
while not Path(sys.argv[1], str(1 - rank)).exists():
    time.sleep(0.01)
print(rank)
"""
ONE_FAILS = """
import os, time
if os.environ["RANK"] == "1":
    raise SystemExit(3)
time.sleep(60)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    (tmp_path / "library.py").write_text(LIBRARY)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer("library")
    yield server
    server.stop()


def test_a_program_runs_as_in_a_fresh_process(server: ForkServer, tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "home")}
    for kind, program, folder in (
        ("code", PROGRAM, ""),
        ("script", tmp_path / "program.py", str(tmp_path)),
        ("module", "program", ""),
    ):
        process = server.run(str(program), "a b", 3, kind=kind, cwd=tmp_path, environment=home)
        assert process.returncode == 0, process.stderr
        expected = ["__main__", ["a b", "3"], str(tmp_path), f"{tmp_path}/home/hub", 1, folder]
        assert json.loads(process.stdout) == expected
        assert "UserWarning: old" in process.stderr


def test_what_fails_is_told(server: ForkServer) -> None:
    process = server.run(PROGRAM, "x", warnings_are_errors=True)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.endswith("UserWarning: old\n")
    process = server.run(PROGRAM, "absent", without=("fractions",))
    assert "import of fractions halted" in process.stderr
    assert server.run("raise SystemExit(7)").returncode == 7
    with pytest.raises(subprocess.TimeoutExpired):
        server.run("while True: pass", timeout=1)
    assert server.run("print('still here')").stdout == "still here\n"


def test_processes_run_together(server: ForkServer, tmp_path: Path) -> None:
    ranks = [{"RANK": "0"}, {"RANK": "1"}]
    processes = server.run_together(MEET, tmp_path, environments=ranks, timeout=50)
    assert [(process.returncode, process.stdout) for process in processes] == [(0, "0\n"), (0, "1\n")]
    processes = server.run_together(ONE_FAILS, environments=ranks, timeout=50)
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 3]


def test_a_library_reads_the_variables_of_the_server(server: ForkServer) -> None:
    program = "import os, library; print(library.ENDPOINT, os.environ.get('HF_ENDPOINT'))"
    assert server.run(program).stdout == "None None\n"
    other = ForkServer("library", HF_ENDPOINT="http://here")
    assert other.run(program).stdout == "http://here http://here\n"
    other.stop()


def test_a_module_that_cannot_be_imported() -> None:
    with pytest.raises(ImportError, match="given no_such_module"):
        ForkServer("no_such_module")
