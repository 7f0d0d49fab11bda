"""An atomic save, and a strict load.

`config.json` decides which files of a checkpoint are read: its `transformers_weights` names the weights and its
`auto_map` the code, also in a subfolder. After each of these steps one complete checkpoint loads with transformers:

    1. write the new checkpoint to `_saving_*/`                                      the old one loads
    2. `os.replace` the `config.json` by one that names the files in `_saving_*/`    from here on the new one loads
    3. delete weights of another layout, and give the new files their usual names too; other files stay
    4. `os.replace` the `config.json` by the usual one, and delete `_saving_*/`
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

CONFIG_FILE = "config.json"
STAGING_PREFIX = "_saving_"  # the Trainer does not upload what begins with an underscore
STAGED_CONFIG, STAGED_INDEX = "staged.json", "staged.safetensors.index.json"
DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # loaded before all else
Header = dict[str, tuple[int, ...]]  # the tensors of a safetensors file and their shapes


def replace_checkpoint(folder: Path, variant: str | None, write: Callable[[Path], None]) -> list[str]:
    """Replaces the checkpoint in `folder` by the one that `write` writes to an empty folder; returns its file names.

    If `write` fails, nothing has changed. Weights of another variant stay.
    """
    staging = folder / f"{STAGING_PREFIX}{uuid.uuid4().hex[:12]}"
    staging.mkdir(parents=True)
    try:
        write(staging)
        names = sorted(path.name for path in staging.iterdir())
        _point_into(staging, names)
        for path in (*staging.iterdir(), staging):
            _flush(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if (staging / STAGED_CONFIG).exists():
        os.replace(staging / STAGED_CONFIG, folder / CONFIG_FILE)
        _flush(folder)
    _install(staging, folder, names, variant)
    for leftover in folder.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(leftover)
    return names


def _point_into(staging: Path, names: list[str]) -> None:
    """Writes the config, and the index of shards, that name the staged files as seen from the folder above."""
    weights = [name for name in names if name.endswith(".safetensors")]
    if CONFIG_FILE not in names or not weights:
        return
    indices = [name for name in names if _is_index(name)]
    if indices:
        index = json.loads((staging / indices[0]).read_text(encoding="utf-8"))
        index["weight_map"] = {key: f"{staging.name}/{file}" for key, file in index["weight_map"].items()}
        (staging / STAGED_INDEX).write_text(json.dumps(index), encoding="utf-8")
    config = json.loads((staging / CONFIG_FILE).read_text(encoding="utf-8"))
    config["transformers_weights"] = f"{staging.name}/{STAGED_INDEX if indices else weights[0]}"
    for name, place in config.get("auto_map", {}).items():
        if isinstance(place, str) and f"{place.partition('.')[0]}.py" in names:
            config["auto_map"][name] = f"{staging.name}/{place}"
    (staging / STAGED_CONFIG).write_text(json.dumps(config), encoding="utf-8")


def _install(staging: Path, folder: Path, names: list[str], variant: str | None) -> None:
    """Gives the files their usual names, in an order in which these never name old and new files together."""
    old = [path for path in folder.iterdir() if _is_weights(path.name, variant)]
    old_shards = [path for path in old if re.search(r"-of-\d{5}\.", path.name)]
    for path in old:  # before an index is put there: transformers prefers the single file
        stays = path.name in names or path in old_shards
        if not stays or _is_index(path.name) or DISTRIBUTED_SHARD.fullmatch(path.name):
            path.unlink()
    for name in sorted(names, key=_is_index):  # an index after its shards
        if name != CONFIG_FILE:
            _place(staging / name, folder / name)
    _flush(folder)
    if CONFIG_FILE in names:
        os.replace(staging / CONFIG_FILE, folder / CONFIG_FILE)
        _flush(folder)
    for path in old_shards:
        if path.name not in names:
            path.unlink(missing_ok=True)


def _place(source: Path, target: Path) -> None:
    """Gives a file a second name, `target`, and replaces the file that had it."""
    spare = source.with_name("placing")
    try:
        os.link(source, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, spare)
        _flush(spare)
    os.replace(spare, target)


def _flush(path: Path) -> None:
    """Flushes to the disk, so that a power cut keeps the order of the steps too."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_index(name: str) -> bool:
    return re.fullmatch(r".+\.safetensors\.index(\..+)?\.json", name) is not None


def _is_weights(name: str, variant: str | None) -> bool:
    v = "" if variant is None else re.escape(f".{variant}")
    pattern = rf"model{v}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{v}\.json"
    return re.fullmatch(pattern, name) is not None or DISTRIBUTED_SHARD.fullmatch(name) is not None


def whole_state_dict(model: nn.Module) -> Any:
    """Gathers sharded weights on the CPU of the first process; empty on the others. All must call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextlib.contextmanager
def own_class(model: PreTrainedModel) -> Iterator[None]:
    """Saves the name and the code of the model's own class, in place of the class that FSDP2 gives it."""
    given: Any = type(model)
    own = next(base for base in given.__mro__ if not base.__module__.startswith("torch."))
    names = given.__module__, given.__name__
    given.__module__, given.__name__ = own.__module__, own.__name__
    try:
        yield
    finally:
        given.__module__, given.__name__ = names


class SavedCheckpoint(PushToHubMixin):
    """The files of a checkpoint on disk, in the form that `push_to_hub` uploads."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        for name in self.names:
            shutil.copyfile(self.folder / name, Path(save_directory, name))


def check_files(folder: Path, variant: str | None, weights: str | None = None) -> dict[str, Header]:
    """Reads the headers of a checkpoint's weights, by file name; empty where the folder has no weights of this kind.

    `weights` is the file that a config names; `None`: the one that the folder's `config.json` names, or a usual name.
    OSError for a file that is missing, cut short or no JSON; ValueError for pickles, and names outside the folder.
    """
    if weights is None and (folder / CONFIG_FILE).is_file():
        weights = _read_json(folder / CONFIG_FILE).get("transformers_weights")
    if any(DISTRIBUTED_SHARD.fullmatch(path.name) for path in folder.iterdir()):
        if weights is not None:
            given = f"a distributed one and an unfinished save, {weights}. To load this, delete shard-*.safetensors"
            raise OSError(f"{folder}: expected one checkpoint, given {given}")
        return {}
    v = "" if variant is None else f".{variant}"
    usual = [f"model{v}.safetensors", f"model.safetensors.index{v}.json"]
    found = [name for name in ([weights] if weights else usual) if _inside(folder, name, CONFIG_FILE).is_file()]
    if not found:
        if pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
            advice = "torch.load(file, weights_only=True) reads what you trust, for MoSForCausalLM(config)"
            raise ValueError(f"{folder}: expected safetensors, given {', '.join(pickles)}, pickled. {advice}")
        return {}
    if not _is_index(found[0]):
        return {found[0]: read_header(folder / found[0])}
    return _check_shards(folder, found[0])


def _check_shards(folder: Path, index_file: str) -> dict[str, Header]:
    index = _read_json(folder / index_file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise OSError(f"{folder / index_file}: expected a weight_map of tensors and their files, given {weight_map!r}")
    headers = {}
    for file in sorted(set(weight_map.values())):
        path = _inside(folder, file, index_file)
        if not path.is_file():
            raise OSError(f"{folder / index_file}: expected {file} beside it, given no such file")
        headers[file] = read_header(path)
    for key, file in weight_map.items():
        if key not in headers[file]:
            raise OSError(f"{folder / file}: expected {key}, as {index_file} says, given no such tensor")
    return headers


def _inside(folder: Path, name: Any, source: str) -> Path:
    """The path of a file that `source` names; it must lie in the folder."""
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or re.search(r"\\|:|(^|/)\.\.(/|$)", name):
        raise ValueError(f"{folder / source}: expected the name of a file in this folder, given {name!r}")
    return folder / name


def read_header(path: Path) -> Header:
    """Reads the shapes in a safetensors file; OSError if its header is broken or says another length."""
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{path}: expected a whole safetensors file, given another: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError both
        raise OSError(f"{path}: expected JSON, given a file that is none: {error}") from error
    if not isinstance(content, dict):
        raise OSError(f"{path}: expected a JSON object, given {type(content).__name__}")
    return content


def check_loaded(
    model: Any, info: dict[str, Any], source: Any, headers: dict[str, Header], allow_mismatched: bool
) -> None:
    """ValueError where a weight is missing or misshapen, or a weight of the head not finite or unexpected.

    `source` and `headers` are for the messages; `allow_mismatched` lets transformers draw misshapen weights anew.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    files = {key: Path(source, file) for file, header in headers.items() for key in header}
    where = ", ".join(str(Path(source, file)) for file in headers) or (source or "state_dict")
    missing = sorted(info["missing_keys"])
    if missing and len(missing) < len(shapes):
        expected = ", ".join(f"{key} of shape {shapes.get(key)}" for key in missing)
        raise ValueError(f"{where}: expected the checkpoint of a {type(model).__name__}, given one without {expected}")
    if model.mos_head is None:
        given = type(model.get_output_embeddings()).__name__
        raise ValueError(f"{where}: expected a mixture's head that stays one while it is loaded, given {given}")
    path = model.head_path()
    own = re.compile(rf"{re.escape(path)}\.(?!weight$)(.+\.)?(weight|bias)")
    if unread := sorted(key for key in info["unexpected_keys"] if own.fullmatch(key)):
        raise ValueError(f"{where}: expected the weights of the head in the config, given {', '.join(unread)} too")
    mismatched = sorted(info["mismatched_keys"])
    if mismatched and not allow_mismatched:
        said = "{}: {}: expected {}, as the config says, given {}"
        lines = [said.format(files.get(key, where), key, tuple(wants), tuple(has)) for key, has, wants in mismatched]
        raise MismatchedWeights("\n".join(lines))
    for key, tensor in model.mos_head.named_parameters(prefix=path):
        readable = tensor.is_floating_point() and not tensor.is_meta and type(tensor) is nn.Parameter
        bad = non_finite(tensor.detach()) if readable and tensor.numel() else None
        if bad is not None:
            raise ValueError(f"{files.get(key, where)}: {key}: expected finite values, given {bad}")


class MismatchedWeights(ValueError, RuntimeError):
    """Weights of another shape than the config says; also the RuntimeError that transformers raises."""


def non_finite(tensor: Tensor) -> float | None:
    """A value that is not finite, or `None`; makes no tensor of the same size."""
    extremes = torch.stack(tensor.aminmax())  # NaN comes through
    return None if extremes.isfinite().all() else float(extremes[~extremes.isfinite()][0])
