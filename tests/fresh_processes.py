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
from collections.abc import Iterable, Mapping
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
    """Starts programs in forks of one process that has imported the modules.

    The variables are those that libraries read when they are imported, such as HF_ENDPOINT.
    """

    def __init__(self, *modules: str, **variables: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        self.variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | self.variables | {"HF_HOME": self._path("home")},
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
        environment: Mapping[str, str] = {},
        timeout: int = 300,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Runs one process of `run_together`, as `subprocess.run` would."""
        (process,) = self.run_together(program, *arguments, environments=[environment], timeout=timeout, **options)
        if process.returncode == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(program, timeout)
        return process

    def run_together(
        self,
        program: str,
        *arguments: Any,
        environments: Iterable[Mapping[str, str]],
        kind: str = "code",
        cwd: Path | None = None,
        warnings_are_errors: bool = False,
        without: tuple[str, ...] = (),
        timeout: int = 300,
    ) -> list[subprocess.CompletedProcess[str]]:
        """Runs Python code, or a `kind` of "script" or "module", in one process for each of the environments.

        The processes run at the same time. If one fails, the others are killed. One that takes too long ends by
        SIGALRM.

        Args:
            environments: What differs from the environment of this process. HF_HOME and PYTHONPATH are obeyed; other
                variables that libraries read when they are imported must be given to the server.
            without: Modules that cannot be imported.
        """
        requests = [
            {
                "program": program,
                "arguments": [*map(str, arguments)],
                "kind": kind,
                "cwd": str(cwd or Path.cwd()),
                "environment": os.environ | self.variables | environment,
                "warnings_are_errors": warnings_are_errors,
                "without": without,
                "timeout": timeout,
                "stdout": self._path(f"stdout-{i}"),
                "stderr": self._path(f"stderr-{i}"),
            }
            for i, environment in enumerate(environments)
        ]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()
        processes = []
        for code, request in zip(json.loads(self._answer()), requests, strict=True):
            printed = (Path(request[name]).read_text() for name in ("stdout", "stderr"))
            processes.append(subprocess.CompletedProcess([program, *map(str, arguments)], code, *printed))
        return processes

    def stop(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


@functools.cache
def fork_server(*modules: str, **variables: str) -> ForkServer:
    """The server of this process with these modules and variables; it ends with this process."""
    return ForkServer(*modules, **variables)


# --------------------------------------------------------------------------------------------- in the server's process


def next_request() -> dict[str, Any]:
    """Forks for each request of a line of the input; returns in the forks alone."""
    for line in sys.stdin:
        codes: dict[int, int | None] = {}  # of each child; None while it runs
        for request in json.loads(line):
            child = os.fork()
            if child == 0:
                return request
            codes[child] = None
        while None in codes.values():
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if status:
                for other in [other for other, code in codes.items() if code is None]:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([*codes.values()]), flush=True)
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
