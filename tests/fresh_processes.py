"""Runs programs in fresh processes without the price of their imports.

torch, transformers and what they import take several CPU seconds in each process. A `ForkServer` is a process that
has imported some modules and does nothing else. Each program runs in a fork of it: a process that has met no model, no
test and no other program. A test of the imports themselves needs a process without it.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a process needs that loads, trains or generates with the code beside a checkpoint.
TRANSFORMERS = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
    "transformers.generation.utils",
)
# What the scripts of examples/ and the `hf-mos` command import too.
PROGRAMS = (
    *TRANSFORMERS,
    "accelerate",
    "datasets",
    "hf_mos",
    "hf_mos.tools.card",
    "hf_mos.tools.train",
    "matplotlib.pyplot",
    "rich.console",
    "rich.progress",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "typer",
)
ERROR = ("error", None, Warning, None, 0)  # the filter of `python -W error`


class ForkServer:
    """Starts programs in forks of one process that has imported the modules."""

    def __init__(self, *modules: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        environment = os.environ | {"HF_HOME": self._path("home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        atexit.register(self.stop)
        if self._answer() != "ready":
            self.stop()
            raise ImportError(f"modules: expected some that can be imported, given {', '.join(modules)}")

    def _path(self, name: str) -> str:
        return str(Path(self.folder.name, name))

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(
        self,
        program: str,
        *arguments: Any,
        kind: str = "code",
        cwd: Path | None = None,
        environment: Mapping[str, str] = {},
        warnings_are_errors: bool = False,
        without: tuple[str, ...] = (),
        timeout: int = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Runs Python code, or a `kind` of "script" or "module", as `subprocess.run` would.

        Args:
            environment: What differs from the environment of this process. HF_HOME and PYTHONPATH are obeyed; other
                variables that libraries read when they are imported are not.
            without: Modules that cannot be imported.
        """
        request = {
            "program": program,
            "arguments": [*map(str, arguments)],
            "kind": kind,
            "cwd": str(cwd or Path.cwd()),
            "environment": os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
            "warnings_are_errors": warnings_are_errors,
            "without": without,
            "timeout": timeout,
            "stdout": self._path("stdout"),
            "stderr": self._path("stderr"),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self._answer())
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(program, timeout)
        printed = (Path(self._path(name)).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([program, *map(str, arguments)], code, *printed)

    def stop(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


@functools.cache
def fork_server(*modules: str) -> ForkServer:
    """The server of this process with these modules; it ends with this process."""
    return ForkServer(*modules)


# --------------------------------------------------------------------------------------------- in the server's process


def next_request() -> dict[str, Any]:
    """Forks for each line of the input; returns in the forks alone."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def constants_of(folder: str) -> list[tuple[types.ModuleType, str]]:
    """The constants that libraries have made of HF_HOME."""
    return [
        (module, name)
        for module in [*sys.modules.values()]
        for name, value in [*getattr(module, "__dict__", {}).items()]
        if type(value) in (str, type(Path())) and str(value).startswith(folder)
    ]


def become(request: dict[str, Any], home: str, constants: list[tuple[types.ModuleType, str]]) -> None:
    """Makes this process what a fresh one for the request would be."""
    signal.alarm(request["timeout"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update({"HF_HOME": home} | request["environment"])
    for module, name in constants:
        value = getattr(module, name)
        setattr(module, name, type(value)(str(value).replace(home, os.environ["HF_HOME"], 1)))
    sys.path[0] = str(Path(request["program"]).parent) if request["kind"] == "script" else ""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in folders if folder and folder not in sys.path]
    random.seed()
    if not request["warnings_are_errors"]:
        warnings.filters.remove(ERROR)  # type: ignore[attr-defined]
    for name in request["without"]:
        sys.modules[name] = None  # type: ignore[assignment]


def run_program(request: dict[str, Any]) -> None:
    program = request["program"]
    sys.argv = [program if request["kind"] == "script" else "-c", *request["arguments"]]
    if request["kind"] == "script":
        runpy.run_path(program, run_name="__main__")
    elif request["kind"] == "module":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    home = os.environ["HF_HOME"]
    constants = constants_of(home)
    gc.collect()
    gc.freeze()  # so that the forks share the memory
    print("ready", flush=True)
    request = next_request()
    become(request, home, constants)
    run_program(request)
