"""The files and folders of a command, before torch and transformers are imported: refuses, deletes, replaces."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# As in `remote_code`, which imports torch.
CONFIG_FILE, MODEL_TYPE = "config.json", "mos"
# Files of an earlier model in the folder, which would be loaded or shown with the new one.
LEFTOVERS = (
    *("chat_template.jinja", "additional_chat_templates/*", "added_tokens.json", "special_tokens_map.json"),
    *("adapter_config.json", "adapter_model*", "*_results.json", "trainer_state.json", "training_args.bin"),
    "README.md",
)


def check_file(file: Path | None, name: str = "file") -> None:
    """Raises a ValueError where there is no such file."""
    if file is not None and not file.is_file():
        raise ValueError(f"{name}: expected a file, given {str(file)!r}, which is none")


def check_is_no_folder(file: Path) -> None:
    """Raises a ValueError where a folder is in the place of a file to write."""
    if file.is_dir():
        raise ValueError(f"{file}: expected a file or none, given a folder")


def check_is_folder(folder: Path, name: str) -> None:
    """Raises a ValueError where a file is in the place of the folder, or of a folder above it."""
    if (file := next((path for path in (folder, *folder.parents) if path.is_file()), None)) is not None:
        raise ValueError(f"{name}: expected a folder, given {str(folder)!r}, where {str(file)!r} is a file")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a path beside this one, and moves the whole file here; until then the former stays."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_text(file: Path) -> str:
    """The text of a file; raises a ValueError where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, given a file that is none: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises a ValueError where it holds something else."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON, given a file that is none: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, given a {type(content).__name__}")
    return content


def check_exists(model: str | Path) -> None:
    """Raises a ValueError for the name of a file, and for one that is no Hub id where there is no such folder."""
    name = str(model)
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    if (is_path or Path(name).is_file()) and not Path(name).is_dir():
        raise ValueError(f"model: expected a folder or a Hub id, given {name!r}, which is neither")


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The `config.json` of the mixture in a folder; raises a ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with a checkpoint, given none: no such folder")
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: expected a folder with a checkpoint, given one without {CONFIG_FILE}")
    config = read_json(folder / CONFIG_FILE)
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder}: expected a mixture of softmaxes, given a {config.get('model_type')!r}")
    return config


def leftovers(folder: Path, more: Sequence[str] = (), before: str | Path | None = None) -> dict[Path, os.stat_result]:
    """Finds the files of a former model that the save of a new one may not replace, for [`delete_unchanged`].

    Args:
        more: further patterns of names.
        before: a checkpoint of the new model's run, which is younger than the former model's files.
    """
    found = {path: path.stat() for pattern in (*LEFTOVERS, *more) for path in folder.glob(pattern) if path.is_file()}
    newest = math.inf if before is None else Path(before).stat().st_mtime_ns
    return {path: stat for path, stat in found.items() if stat.st_mtime_ns < newest}


def delete_unchanged(files: dict[Path, os.stat_result]) -> None:
    """Deletes those of the files that nothing has written since `leftovers`. Call it after the new model is saved."""
    for path, before in files.items():
        if path.exists() and os.path.samestat(now := path.stat(), before) and now.st_mtime_ns == before.st_mtime_ns:
            path.unlink()
