"""Refuses files, folders and names that cannot be what a command needs, before torch and transformers are imported."""

import json
from pathlib import Path
from typing import Any

# As in `remote_code`, which imports torch.
CONFIG_FILE, MODEL_TYPE = "config.json", "mos"
# Files of an earlier model in the folder, which would be loaded or shown with the new one.
LEFTOVERS = (
    *("chat_template.jinja", "additional_chat_templates/*", "added_tokens.json", "special_tokens_map.json"),
    *("adapter_config.json", "adapter_model*", "*_results.json", "trainer_state.json"),
)


def check_file(file: Path | None) -> None:
    """Raises a ValueError where there is no such file."""
    if file is not None and not file.is_file():
        raise ValueError(f"file: expected a file, given {str(file)!r}, which is none")


def check_exists(model: str | Path) -> None:
    """Raises a ValueError if the name can only be that of a folder, and there is no such folder."""
    name = str(model)
    if (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name) and not Path(name).is_dir():
        raise ValueError(f"model: expected a folder or a Hub id, given {name!r}, which is neither")


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The `config.json` of the mixture in a folder; raises a ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with a checkpoint, given none: no such folder")
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: expected a folder with a checkpoint, given one without {CONFIG_FILE}")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder}: expected a mixture of softmaxes, given a {config.get('model_type')!r}")
    return config


def delete_leftovers(folder: Path) -> None:
    """Deletes the files of a former model, of which a new one in the same folder may have none."""
    for path in (path for pattern in LEFTOVERS for path in folder.glob(pattern)):
        path.unlink()
