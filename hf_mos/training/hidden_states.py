"""Trains the head alone at the cost of the head alone: the backbone runs once, and its hidden states are kept on disk.

```python
freeze_backbone(model)
rows = keep_hidden_states(model, blocks, Path("out/hidden_states"))
Trainer(model, arguments, train_dataset=rows).train()
```
"""

import hashlib
import inspect
import json
import os
import shutil
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..remote_code.configuration_mos import option_defaults
from ..remote_code.modeling_mos import MoSForCausalLM

DATA_FILE, PROGRESS_FILE = "hidden_states.bin", "progress.json"
Row = dict[str, Any]


def freeze_backbone(model: MoSForCausalLM, train_decoder: bool | None = None) -> None:
    """Freezes all parameters but the head's, so that hidden states that were computed once stay true.

    The head's prior and shift train. The decoder, the head's own weight and bias, trains too unless it is tied.

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
    """A row of hidden states; no `dict`, of which the Trainer drops what a softmax model's forward does not name."""


class HiddenStateRows(Dataset):
    """Rows of `hidden_states` (length, D) and `labels` (length,), views of a memory-mapped file."""

    def __init__(self, states: Tensor, labels: Sequence[Tensor]) -> None:
        self.states, self.labels = states, labels
        self.starts = [0]
        for row in labels:
            self.starts.append(self.starts[-1] + len(row))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> KeptRow:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start, end = self.starts[index], self.starts[index + 1]
        return KeptRow(hidden_states=self.states[start:end], labels=self.labels[index])


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

    Equivalent to: `[{"hidden_states": model.head_inputs(input_ids=row), "labels": labels} for row in rows]`. The
    model takes such rows in place of `input_ids`. An interrupted call is taken up where it stopped, and one that was
    finished for the same rows and the same backbone is not repeated.

    Args:
        model: with a frozen backbone, see [`freeze_backbone`].
        rows: each with `input_ids` and `labels` of the same length, without padding.
        folder: of the file; it must be on a disk with [`bytes_of`] free.
        batch_size: rows of one length at a time.
        track: takes the list of batches that are left and yields them, to show progress.

    Raises:
        ValueError: a parameter of the backbone trains, or the disk has too little space.
    """
    trained = next((name for name, weight in backbone_weights(model) if weight.requires_grad), None)
    if trained is not None:
        raise ValueError(f"model: expected a frozen backbone, given one that trains {trained}; call freeze_backbone")
    folder.mkdir(parents=True, exist_ok=True)
    data_file, progress_file = folder / DATA_FILE, folder / PROGRESS_FILE
    lengths = [len(row["input_ids"]) for row in rows]
    D, dtype, needed = hidden_size(model), dtype_of(model), bytes_of(model, rows)
    print_of_inputs = fingerprint(model, rows)
    done = rows_done(progress_file, print_of_inputs) if data_file.exists() else 0
    if done == 0:
        data_file.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(f"{folder}: expected {needed:,} bytes of free space, given {free:,}")
    states = torch.from_file(str(data_file), shared=True, size=sum(lengths) * D, dtype=dtype).view(-1, D)
    kept = HiddenStateRows(states, [torch.as_tensor(row["labels"]) for row in rows])

    was_training = model.training
    model.eval()
    try:
        for batch in track(batches_of(lengths, done, batch_size)):
            input_ids = torch.stack([torch.as_tensor(rows[index]["input_ids"]) for index in batch]).to(model.device)
            outputs = model.head_inputs(input_ids=input_ids, **without_cache(model))
            states[kept.starts[batch[0]] : kept.starts[batch[-1] + 1]] = outputs.flatten(0, 1).to("cpu", dtype)
            write_progress(progress_file, print_of_inputs, batch[-1] + 1)
    finally:
        model.train(was_training)
    return kept


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


def without_cache(model: MoSForCausalLM) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def batches_of(lengths: list[int], start: int, batch_size: int) -> list[range]:
    """The rows from `start` on, in order, at most `batch_size` of one length at a time."""
    batches: list[range] = []
    for index in range(start, len(lengths)):
        last = batches[-1] if batches else range(0)
        if len(last) in (0, batch_size) or lengths[last[0]] != lengths[index]:
            batches.append(range(index, index + 1))
        else:
            batches[-1] = range(last[0], index + 1)
    return batches


def fingerprint(model: MoSForCausalLM, rows: Sequence[Row]) -> str:
    """A hash of all that decides the hidden states: tokens, the backbone's config and weights, and autocast."""
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in option_defaults()}
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    device_type = model.device.type
    if torch.is_autocast_enabled(device_type):
        found.update(str(torch.get_autocast_dtype(device_type)).encode())
    for name, weight in backbone_weights(model):
        found.update(f"{name} {weight.dtype} {weight.double().sum()} {weight.double().square().sum()}".encode())
    for row in rows:
        found.update(torch.as_tensor(row["input_ids"], dtype=torch.int64).numpy().tobytes())
        found.update(b";")
    return found.hexdigest()


def rows_done(progress_file: Path, print_of_inputs: str) -> int:
    """How many rows the file holds; 0 if it is of other rows or another backbone."""
    try:
        progress = json.loads(progress_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    return int(progress["rows"]) if progress.get("fingerprint") == print_of_inputs else 0


def write_progress(progress_file: Path, print_of_inputs: str, rows: int) -> None:
    spare = progress_file.with_suffix(".tmp")
    spare.write_text(json.dumps({"fingerprint": print_of_inputs, "rows": rows}), encoding="utf-8")
    os.replace(spare, progress_file)
