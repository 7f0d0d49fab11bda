"""Training steps whose losses and weights must be the same on one process and on two."""

import json
from pathlib import Path
from typing import Any

import torch
from helpers import part_components, random_tokens, tiny_causal_lm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_mos import MoSForCausalLM
from hf_mos.training.callbacks import MixtureUsage

MODELS = ("gpt2", "llama-tied", "llama", "llama M=8")  # the first is tied too; the last has a shortlist
STEPS, BATCH, LENGTH = 5, 4, 12
LEARNING_RATE = 0.05
ACCUMULATION = 2  # of the Trainer


def make_model(name: str, **options: Any) -> MoSForCausalLM:
    """A model whose weights are so small that rounding stays below what is compared. It has all classes in its
    mixture, or a shortlist: "llama M=8"."""
    name, _, size = name.partition(" M=")
    options = {"num_mixtures": 3, "shortlist_size": int(size) if size else None, **options}
    model = MoSForCausalLM.from_causal_lm(tiny_causal_lm(name, initializer_range=0.1), **options)
    part_components(model)
    return model.train()


def joint_batch(step: int) -> dict[str, Tensor]:
    """The rows of all ranks. Each has another number of labels that count, the first half far fewer."""
    input_ids = random_tokens(BATCH, LENGTH, seed=step)
    labels = input_ids.clone()
    for row in range(BATCH):
        labels[row, : 8 - 2 * row] = -100
    return {"input_ids": input_ids, "labels": labels}


def share_of(batch: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    return {name: tensor.chunk(world_size)[rank] for name, tensor in batch.items()}


def count_targets(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def train(model: nn.Module, rank: int = 0, world_size: int = 1, first: int = 0, steps: int = STEPS) -> list[float]:
    """Steps of SGD with momentum on this rank's share of each batch; the losses of the joint batches.

    Gradients are averaged over the ranks by the engine, so each rank's summed loss is divided by its part of the
    targets of the joint batch.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    return take_steps(model, optimizer, range(first, first + steps), rank, world_size)


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world_size: int = 1
) -> list[float]:
    losses = []
    for step in steps:
        batch = joint_batch(step)
        num_items = count_targets(batch) / world_size
        loss = model(**share_of(batch, rank, world_size), num_items_in_batch=num_items).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world_size
        if world_size > 1:
            torch.distributed.all_reduce(mean)
        losses.append(float(mean))
    return losses


def training_rows() -> list[dict[str, Tensor]]:
    """Each row has another number of labels that count."""
    rows = []
    for i, tokens in enumerate(random_tokens(STEPS * ACCUMULATION * BATCH, LENGTH)):
        labels = tokens.clone()
        labels[: i % (LENGTH - 1)] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def run_trainer(
    folder: str | Path,
    name: str,
    world_size: int = 1,
    *,
    model: MoSForCausalLM | None = None,
    callbacks: Any = (),
    usage: MixtureUsage | None = None,
    rows: list[dict[str, Tensor]] | None = None,
    **options: Any,
) -> Trainer:
    """A few steps of a Trainer, of the same batches whatever the number of processes."""
    arguments = TrainingArguments(
        output_dir=f"{folder}/{name}-out",
        per_device_train_batch_size=BATCH // world_size,
        optim="sgd",  # Adam blows up the rounding of gradients that are zero
        learning_rate=0.05,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{
            "gradient_accumulation_steps": ACCUMULATION,
            "use_cpu": True,
            "ddp_find_unused_parameters": False,
            **options,
        },
    )
    rows = training_rows() if rows is None else rows
    model = make_model(name) if model is None else model
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))
    if usage is not None:
        usage.add_to(trainer)
    trainer.train()
    return trainer


def save_results(folder: str | Path, name: str, losses: list[float], weights: dict[str, Tensor]) -> None:
    """Of one rank, which may hold another one's storage."""
    path = Path(folder, name)
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in weights.items()}, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(losses))


def load_results(folder: Path, name: str) -> tuple[list[float], dict[str, Tensor]]:
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def assert_like_one_process(folder: Path, name: str, model: MoSForCausalLM, tolerance: float = 1e-6) -> None:
    """Of the results of a rank: losses and weights are those of one process on the joint batches."""
    losses, weights = load_results(folder, name)
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    expected = train(model)
    torch.testing.assert_close(losses, expected, rtol=0, atol=tolerance)
    assert_close_to(model, weights, tolerance)
    for key, tensor in model.named_parameters():
        assert (tensor - before[key]).abs().max() > 100 * tolerance, f"{key} has hardly moved"


def assert_close_to(model: MoSForCausalLM, weights: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    parameters = dict(model.named_parameters())
    assert weights.keys() == parameters.keys()
    for key, tensor in parameters.items():
        gap = (weights[key] - tensor.detach()).abs().max()
        assert gap <= tolerance, f"{key}: expected a gap of at most {tolerance}, given {gap}"
