"""Kills a process with SIGKILL at its n-th change of a folder."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import transformers.modeling_utils

CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")
CODE_FILES = ("modeling_mos.py", "mos_head.py")  # two stand for all, as each is copied like the others


class Killer:
    """Counts the changes of the files in a folder, and kills this process at one of them.

    Renaming, linking and removing are killed before they are done. Of a file that is written an empty one is left; of
    a safetensors file half.
    """

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.count, self.dies = str(folder), at, 0, False

    def install(self) -> None:
        sys.addaudithook(self.audit)
        safe_save_file = safetensors.torch.save_file

        def save_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            if self.is_last():
                safe_save_file(tensors, filename, *args, **kwargs)
                os.truncate(filename, os.path.getsize(filename) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            safe_save_file(tensors, filename, *args, **kwargs)

        transformers.modeling_utils.safe_save_file = save_file

    def is_last(self) -> bool:
        self.count += 1
        return self.count == self.at

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.dies:
            return
        if event == "open":
            path, _, flags = arguments
            if not str(path).startswith(self.folder) or not flags & os.O_TRUNC:
                return
        elif event not in CHANGES:
            return
        names = [os.path.basename(str(argument)) for argument in arguments[:2]]
        if any(name.endswith(".py") and name not in CODE_FILES for name in names):
            return
        if self.is_last():
            self.dies = True
            if event == "open":
                os.close(os.open(path, flags))
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_every_change(save: Callable[[Path], None], fresh: Callable[[], Path]) -> Iterator[Path]:
    """Runs `save(fresh())` in one forked process after another, each killed one change later than the one before.

    Yields:
        The folder after each kill, and last the folder of the process that was not killed any more.
    """
    finished = False
    at = 0
    while not finished:
        at += 1
        folder = fresh()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
                Killer(folder, at).install()
                save(folder)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        finished = os.WIFEXITED(status)
        assert not finished or os.WEXITSTATUS(status) == 0, "the save raised"
        yield folder
