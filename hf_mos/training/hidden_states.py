"""Trains the head alone at the cost of the head alone: the backbone runs once, and its hidden states are kept on disk.

```python
freeze_backbone(model)
rows = keep_hidden_states(model, blocks, Path("out/hidden_states"))
Trainer(model, arguments, train_dataset=rows).train()
```
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import Dataset

from ..remote_code.configuration_mos import option_defaults
from ..remote_code.modeling_mos import MoSForCausalLM
from ..remote_code.mos_head import device_of

PREFIX, LOCK_FILE = "hidden_states-", ".lock"
HEADER_BYTES = 4096  # so that the hidden states begin on a page of memory
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}
WITHOUT_EFFECT = ("training", "gradient_checkpointing", "skip_logits_in_training")  # on the hidden states
Row = Mapping[str, Any]


def freeze_backbone(model: MoSForCausalLM, train_decoder: bool | None = None) -> None:
    """Freezes all parameters but the head's, so that the hidden states stay as they were computed once.

    Prior, shift and widening of the head train. The decoder, its own weight and bias, trains too unless it is tied.

    Args:
        train_decoder: whether the decoder trains. `None`: if it is not tied to the input embedding.

    Raises:
        ValueError: the decoder is tied and would train, or the backbone has dropout, an adapter or a router loss: its
            hidden states, or its loss, would change during the training.
    """

    def refuse(expected: str, given: str) -> None:
        raise ValueError(f"freeze_backbone: expected {expected}, given {given}")

    head: Any = model.mos_head
    tied = any(weight is head.weight for _, weight in backbone_weights(model))
    if train_decoder and tied:
        refuse("a decoder of its own to train (tie_word_embeddings=False)", "one that is the input embedding too")
    for where, rate in dropout_rates(model):
        refuse("a backbone without dropout", f"{where}={rate}; set it to 0 when you load the model")
    for name, module in backbone_modules(model):
        if hasattr(module, "base_layer"):
            refuse("a backbone without an adapter", f"one on {name}")
    if getattr(model.config, "output_router_logits", False):
        refuse("output_router_logits=False, as a frozen router learns nothing from its loss", "True")
    for _, weight in backbone_weights(model):
        weight.requires_grad_(False)
    for weight in (head.weight, head.bias):
        if weight is not None:
            weight.requires_grad_(not tied if train_decoder is None else train_decoder)


def backbone_modules(model: MoSForCausalLM) -> list[tuple[str, nn.Module]]:
    """The modules outside of the head, with their names."""
    of_head = {*model.get_output_embeddings().modules()}
    return [(name, module) for name, module in model.named_modules() if module not in of_head]


def backbone_weights(model: MoSForCausalLM) -> list[tuple[str, nn.Parameter]]:
    """The parameters that decide the hidden states, with their names; the input embedding too where it is tied."""
    return [
        (f"{name}.{own}" if name else own, weight)
        for name, module in backbone_modules(model)
        for own, weight in module.named_parameters(recurse=False)
    ]


def dropout_rates(model: MoSForCausalLM) -> Iterator[tuple[str, float]]:
    """The names and rates of the dropout outside of the head, in the modules and in the config."""
    for name, module in backbone_modules(model):
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield name, module.p
    for name, value in vars(model.config.get_text_config()).items():
        of_text = ("drop" in name or "jitter" in name) and not name.startswith(("summary_", "classifier_"))
        if of_text and isinstance(value, float) and value > 0:
            yield name, value


class KeptRow(UserDict):
    """A row of hidden states. The Trainer would drop them from a `dict`, as no softmax model's forward names them."""


class HiddenStateRows(Dataset):
    """Rows of `hidden_states` (length, D) and `labels` (length,), copies out of a memory-mapped file.

    A process that these rows are sent to, such as a worker of a DataLoader, opens the file itself.
    """

    def __init__(self, file: Path, labels: Sequence[Any]) -> None:
        self.file, self.labels = file, [torch.as_tensor(row) for row in labels]
        with safe_open(file, "pt") as opened:
            self.states = opened.get_tensor("hidden_states")
        self.rows = self.states.split([len(row) for row in self.labels])

    def __reduce__(self) -> Any:
        return type(self), (self.file, [row.numpy() for row in self.labels])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> KeptRow:
        return KeptRow(hidden_states=self.rows[index].clone(), labels=self.labels[index])


def bytes_of(model: MoSForCausalLM, rows: Sequence[Row]) -> int:
    """The size of the hidden states of these rows, in bytes."""
    return sum(len(row["input_ids"]) for row in rows) * hidden_size(model) * dtype_of(model).itemsize


def hidden_size(model: MoSForCausalLM) -> int:
    """D, the width of the hidden states that the head reads."""
    head: Any = model.mos_head
    return head.in_features


def dtype_of(model: MoSForCausalLM) -> torch.dtype:
    """The dtype of the hidden states; the model hands fp16 on as fp32."""
    return torch.float32 if model.dtype == torch.float16 else model.dtype


@torch.no_grad()
def keep_hidden_states(
    model: MoSForCausalLM,
    rows: Sequence[Row],
    folder: Path,
    *,
    batch_size: int = 8,
    track: Callable[[Sequence[range]], Iterable[range]] = iter,
) -> HiddenStateRows:
    """Runs the backbone over the rows once, and returns rows of its hidden states with the same labels.

    Equivalent to: `[{"hidden_states": model.head_inputs(**row, use_cache=False), "labels": labels} for row, labels in
    rows]`, as under the Trainer. The model takes such rows in place of `input_ids`.

    Each set of rows and backbone has its own file, named by a hash of all that decides the hidden states. If it is
    there and holds the bytes that were written, it is read. An interrupted call is taken up where it stopped; a call
    with other inputs deletes the partial file. One process at a time writes into a folder, and others wait. Finished
    files stay until you delete them.

    Args:
        model: with a frozen backbone, see [`freeze_backbone`].
        rows: each with `input_ids`, `labels` of the same length, and any other arguments of the model's forward.
        folder: of the files; it must be on a disk with [`bytes_of`] free.
        batch_size: rows of one length at a time.
        track: takes the list of batches that are left and yields them, to show progress.

    Raises:
        ValueError: a parameter of the backbone trains, or is not whole in memory; a row has no tokens, no labels or
            something that the forward does not name; a hidden state is not finite; the disk has too little space.
    """
    trained = next((name for name, weight in backbone_weights(model) if weight.requires_grad), None)
    if trained is not None:
        raise ValueError(f"model: expected a frozen backbone, given one that trains {trained}; call freeze_backbone")
    if not hasattr(rows, "__len__") or len(rows) == 0:
        raise ValueError(f"rows: expected a sequence of at least one row, given {type(rows).__name__}")
    inputs = [tensors_of(model, rows, index) for index in range(len(rows))]
    labels = [row.pop("labels") for row in inputs]
    digest = digest_of_backbone(model)
    for row in inputs:
        for name, tensor in sorted(row.items()):
            feed(digest, name, tensor)
    ends, fingerprint = [0, *accumulate(len(row) for row in labels)], digest.hexdigest()
    file = Path(folder).absolute() / f"{PREFIX}{fingerprint[:16]}.safetensors"
    layout = Layout(fingerprint, ends, hidden_size(model), dtype_of(model))
    if layout.rows_in(file)[0] < len(rows):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.parent / LOCK_FILE):
            if layout.rows_in(file)[0] < len(rows):  # no other process made it meanwhile
                run_backbone(model, inputs, file, layout, batch_size, track)
    return HiddenStateRows(file, labels)


@torch.no_grad()
def sum_nats(model: MoSForCausalLM, rows: HiddenStateRows) -> float:
    """The summed negative log-likelihood, in nats, of rows whose labels are targets: aligned, not shifted."""
    model.eval()
    total = 0.0
    for index in range(len(rows)):
        states, targets = rows[index]["hidden_states"].unsqueeze(0), rows[index]["labels"].unsqueeze(0)
        outputs = model(hidden_states=states, shift_labels=targets, num_items_in_batch=1, skip_logits=True)
        total += float(outputs.loss)
    return total


@dataclass(frozen=True)
class Layout:
    """A safetensors file of the hidden states of all tokens, whose header says which rows are written.

    It holds a hash of their bytes, so that a file which was cut short, filled with zeros or changed counts as empty.
    """

    fingerprint: str  # of the rows and the backbone
    ends: list[int]  # the tokens up to each row
    width: int
    dtype: torch.dtype

    def bytes_up_to(self, row: int) -> int:
        return self.ends[row] * self.width * self.dtype.itemsize

    def header(self, rows: int, digest: Any) -> bytes:
        fields: dict[str, Any] = {"dtype": SAFETENSORS_DTYPES[self.dtype], "shape": [self.ends[-1], self.width]}
        fields["data_offsets"] = [0, self.bytes_up_to(-1)]
        written = {"fingerprint": self.fingerprint, "rows": str(rows), "sha256": digest.hexdigest()}
        text = json.dumps({"__metadata__": written, "hidden_states": fields}).encode()
        return (HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8)

    def rows_in(self, path: Path) -> tuple[int, Any]:
        """How many rows a file holds, and the digest of their bytes."""
        with contextlib.suppress(OSError, ValueError, LookupError), path.open("rb") as file:
            header, digest = file.read(HEADER_BYTES), hashlib.sha256()
            rows = int(json.loads(header[8:])["__metadata__"]["rows"])
            left = self.bytes_up_to(rows)
            while chunk := file.read(min(left, 1 << 20)):
                digest.update(chunk)
                left -= len(chunk)
            is_longer = rows == len(self.ends) - 1 and file.read(1)
            if header == self.header(rows, digest) and not is_longer:
                return rows, digest
        return 0, hashlib.sha256()


def run_backbone(
    model: MoSForCausalLM,
    inputs: list[dict[str, Tensor]],
    file: Path,
    layout: Layout,
    batch_size: int,
    track: Callable[[Sequence[range]], Iterable[range]],
) -> None:
    """Writes the rows that are not there yet to a file beside, and gives it its name when it holds all."""
    part = file.with_suffix(".part")
    for other in {*file.parent.glob(f"{PREFIX}*.part")} - {part}:
        other.unlink()
    done, digest = layout.rows_in(part)
    needed, free = layout.bytes_up_to(-1) - layout.bytes_up_to(done), shutil.disk_usage(file.parent).free
    if free < needed:
        raise ValueError(f"{file.parent}: expected {needed:,} bytes of free space, given {free:,}")
    head: Any = model.mos_head
    device, options = device_of(head), {"use_cache": False} if "use_cache" in model.argument_names else {}
    was_training, batches = model.training, batches_of(inputs, done, batch_size)
    model.eval()
    try:
        with part.open("r+b" if done else "wb") as opened:
            for batch, _ in zip(batches, track(batches), strict=True):
                stacked = {name: torch.stack([inputs[row][name] for row in batch]).to(device) for name in inputs[done]}
                outputs = model.head_inputs(**stacked, **options).to("cpu", layout.dtype)
                outputs = outputs.reshape(*stacked["input_ids"].shape, layout.width).contiguous()
                for row, states in zip(batch, outputs, strict=True):
                    if not states.isfinite().all():
                        raise ValueError(f"rows[{row}]: expected finite hidden states, given NaN or infinity")
                data = outputs.flatten().view(torch.uint8).numpy()
                opened.seek(HEADER_BYTES + layout.bytes_up_to(done))
                opened.write(data.data)
                digest.update(data)
                done = batch.stop
                opened.seek(0)
                opened.write(layout.header(done, digest))
                opened.flush()
            opened.truncate(HEADER_BYTES + layout.bytes_up_to(done))
    finally:
        model.train(was_training)
    os.replace(part, file)


def batches_of(inputs: list[dict[str, Tensor]], start: int, batch_size: int) -> list[range]:
    """The rows from `start` on, in order, at most `batch_size` of the same shapes at a time."""
    shapes = [{name: tensor.shape for name, tensor in row.items()} for row in inputs]
    batches: list[range] = []
    for index in range(start, len(shapes)):
        last = batches[-1] if batches else range(0)
        if len(last) in (0, batch_size) or shapes[last[0]] != shapes[index]:
            batches.append(range(index, index + 1))
        else:
            batches[-1] = range(last[0], index + 1)
    return batches


def tensors_of(model: MoSForCausalLM, rows: Sequence[Row], index: int) -> dict[str, Tensor]:
    """The labels and the inputs of a row."""
    row, needed = rows[index], {"input_ids", "labels"}
    given = [name for name, value in row.items() if value is not None] if isinstance(row, Mapping) else [type(row)]
    if not needed <= {*given} <= {*model.argument_names} | needed:
        expected = f"input_ids, labels and what {type(model).__name__}.forward names"
        raise ValueError(f"rows[{index}]: expected {expected}, given {given}")
    tensors = {name: row[name] if isinstance(row[name], Tensor) else torch.tensor(row[name]) for name in given}
    tokens, labels = tensors["input_ids"].shape, tensors["labels"].shape
    if len(tokens) != 1 or tokens[0] == 0 or labels != tokens:
        shapes = f"shapes {[*tokens]} and {[*labels]}"
        raise ValueError(f"rows[{index}]: expected a token or more, each with its label, given {shapes}")
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def digest_of_backbone(model: MoSForCausalLM) -> Any:
    """A digest of the backbone's config, classes, weights, buffers, numbers and hooks, and of its run's precision."""
    head: Any = model.mos_head
    without_effect = {*option_defaults(), "use_cache"}  # the Trainer changes the latter
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in without_effect}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, module in backbone_modules(model):
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        feed(digest, name, [getattr(each, "__qualname__", type(each)) for each in (type(module), *hooks)])
        with align_module_device(module):  # loads the weights that accelerate keeps elsewhere
            values: dict[str, Any] = {
                own: value for own, value in vars(module).items() if isinstance(value, (int, float, Tensor))
            }
            values = {own: value for own, value in values.items() if own[0] != "_" and own not in WITHOUT_EFFECT}
            values |= module._parameters | module._buffers
            module._save_to_state_dict(values, "", keep_vars=True)  # with the scales of quantized weights
            for own, value in values.items():
                feed(digest, f"{name}.{own}", value)
    device_type = device_of(head).type
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    feed(digest, "", (autocast, torch.get_float32_matmul_precision(), model.config._attn_implementation))
    return digest


def feed(digest: Any, name: str, value: Any) -> None:
    """Adds a tensor's bytes or another value's text to a digest."""
    if any(hasattr(value, each) for each in ("device_mesh", "ds_id")) or getattr(value, "is_meta", False):
        raise ValueError(f"model: expected weights that are whole and in memory, given {name} in parts or elsewhere")
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):  # such as a weight that torchao quantized
        parts, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        feed(digest, f"{name}: {type(value)}", repr(context))
        for part in parts:
            feed(digest, f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor):
        digest.update(f"{name}: {value.dtype} {[*value.shape]};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    else:
        digest.update(f"{name}: {value!r};".encode())
