"""One training: for a fixed number of steps, or until the validation loss no longer falls.

Seconds are those that the processor spent on the steps, of one thread (`time.process_time`): other work on the machine
hardly changes them. Evaluation is not counted.
"""

import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel

Inputs = dict[str, Tensor]  # of the model, with labels


class Data(Protocol):
    """What a training reads: the text of `text.py`, or hidden states of a pretrained model."""

    measured: tuple[str, ...]  # the splits: `valid`, or `valid` and `test`

    def batches(self, batch_size: int, seed: int) -> Iterator[Inputs]:
        """Yields batches epoch after epoch, each shuffled; the seed determines the order."""

    def nats(self, model: PreTrainedModel, split: str) -> float:
        """The nats per token of the split `valid` or `test`."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a training with AdamW and gradients of norm 1 at most."""

    steps: int  # all of them, or at most where it stops early
    learning_rate: float
    head_learning_rate: float | None = None  # of the prior and the shifts times their scale; `None`: as all the rest
    batch_size: int = 16  # blocks
    weight_decay: float = 0.01
    warmup: float = 0.05  # of the steps
    # `False`: the head alone, with the decoder, which the input embedding then lets go; `None`: what is not frozen.
    train_backbone: bool | None = True
    to_convergence: bool = False  # constant learning rate, a quarter of it whenever the validation loss stays
    evaluate_every: int = 100
    patience: int = 2  # evaluations without an improvement of `least_gain` before the learning rate is cut
    least_gain: float = 0.002  # nats
    cuts: int = 3
    measure_every: int | None = None  # steps between two points of the curve; on convergence `evaluate_every`

    @property
    def settings(self) -> dict[str, Any]:
        found = asdict(self)
        if self.measure_every is None:  # as runs say that are older than this field
            del found["measure_every"]
        return found


def new_latents_rate(learning_rate: float) -> float:
    """The rate of prior and latents from scratch. They start at the identity, and every class reads them."""
    return learning_rate / 10


def from_scratch_recipe(steps: int, learning_rate: float, head_learning_rate: float | None = None) -> Recipe:
    """The recipe from random weights for a fixed number of steps. Shorter warm-up and larger batches learn slower."""
    return Recipe(steps, learning_rate, head_learning_rate, batch_size=8, warmup=0.25)


def convergence_recipe(steps: int, learning_rate: float, head_learning_rate: float | None = None) -> Recipe:
    """The recipe from random weights until a learning rate, cut three times, gains less than half a percent.

    Batches are larger than for a fixed number of steps: in the end their noise is what keeps the loss up.
    """
    every = max(50, steps // 160)
    return Recipe(
        steps, learning_rate, head_learning_rate, to_convergence=True, evaluate_every=every, least_gain=0.005
    )


def checkpoint_recipe(steps: int, learning_rate: float = 2e-2) -> Recipe:
    """The recipe of the softmax model that a fine-tuning starts from: until its validation loss no longer falls."""
    return Recipe(steps, learning_rate, to_convergence=True, evaluate_every=max(50, steps // 80))


def fit(
    model: PreTrainedModel, data: Data, recipe: Recipe, seed: int, name: str, unfinished: Path | None = None
) -> dict[str, Any]:
    """Trains the model and measures it, in nats per token.

    Args:
        unfinished: a file that keeps the state of the training at each point of the curve, and is gone at the end. A
            training that finds the file goes on from there, to the same weights.

    Returns:
        `valid_nats`, and `test_nats` if there is a test split, of the weights that the training ends with (on
        convergence the best ones), `seconds`, `steps`, `stopped_early`, `parameters`, and the `curve` of (step,
        seconds, validation nats, nats of the batches since the point before).
    """
    optimizer = make_optimizer(model, recipe)
    torch.manual_seed(seed)  # of dropout
    stop = Plateau(recipe) if recipe.to_convergence else None
    at = State()
    if unfinished is not None and unfinished.exists():
        at = restore(unfinished, model, optimizer, stop)
    batches = itertools.islice(data.batches(recipe.batch_size, seed), at.step, None)
    every, losses = recipe.evaluate_every if stop else recipe.measure_every or recipe.steps, []
    stopped_early = False
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=recipe.steps, completed=at.step)
        while at.step < recipe.steps and not stopped_early:
            scale = min(1.0, (at.step + 1) / (recipe.steps * recipe.warmup))
            scale *= stop.scale if stop else 1 - at.step / recipe.steps
            if hasattr(head := getattr(model, "mos_head", None), "progress"):
                head.progress = at.step / recipe.steps
            started = time.process_time()
            losses.append(take_step(model, next(batches), optimizer, scale))
            at.seconds += time.process_time() - started
            at.step += 1
            progress.advance(task)
            if at.step % every or (at.step == recipe.steps and not stop):
                continue
            since = float(torch.stack(losses).mean())
            at.curve.append((at.step, round(at.seconds, 3), data.nats(model, "valid"), since))
            losses.clear()
            if stop:
                is_best, is_over = stop.judge(at.curve[-1][2])
                if is_best:
                    at.best = {name: weight.detach().clone() for name, weight in trained_parameters(model)}
                elif is_over and at.best is not None:
                    model.load_state_dict(at.best, strict=False)
                stopped_early = is_over and stop.cuts > recipe.cuts
            if not progress.console.is_terminal:  # a bar is drawn on a terminal alone
                line = f"{name}: step {at.step} of {recipe.steps}, validation {at.curve[-1][2]:.3f} nats"
                progress.console.print(line, soft_wrap=True)
            if unfinished is not None:
                keep(unfinished, at, model, optimizer, stop)
    if at.best is not None:
        model.load_state_dict(at.best, strict=False)
    nats = {f"{split}_nats": data.nats(model, split) for split in data.measured}
    if not math.isfinite(nats["valid_nats"]):
        raise FloatingPointError(f"{name}: the validation loss is {nats['valid_nats']}")
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    return {
        **nats,
        "seconds": round(at.seconds, 3),
        "steps": at.step,
        "stopped_early": stopped_early,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": at.curve,
    }


@dataclass
class State:
    """How far a training is."""

    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None  # the weights of the lowest validation loss, on convergence


def keep(
    path: Path, at: State, model: PreTrainedModel, optimizer: torch.optim.Optimizer, stop: "Plateau | None"
) -> None:
    """Writes atomically all that the rest of the training depends on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".partial")
    kept = {"at": vars(at), "weights": dict(trained_parameters(model)), "optimizer": optimizer.state_dict()}
    torch.save(kept | {"stop": stop and stop.state, "random": torch.get_rng_state()}, staged)
    os.replace(staged, path)


def restore(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, stop: "Plateau | None") -> State:
    kept = torch.load(path, weights_only=True)
    model.load_state_dict(kept["weights"], strict=False)
    optimizer.load_state_dict(kept["optimizer"])
    torch.set_rng_state(kept["random"])
    if stop is not None:
        stop.state = kept["stop"]
    return State(**kept["at"])


class Plateau:
    """Cuts the learning rate when the validation loss no longer falls, and finally stops."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.scale, self.lowest, self.waited, self.cuts = 1.0, math.inf, 0, 0

    @property
    def state(self) -> tuple[float, float, int, int]:
        return self.scale, self.lowest, self.waited, self.cuts

    @state.setter
    def state(self, kept: tuple[float, float, int, int]) -> None:
        self.scale, self.lowest, self.waited, self.cuts = kept

    def judge(self, nats: float) -> tuple[bool, bool]:
        """Whether this validation loss is the lowest, and whether the learning rate must be cut."""
        gain, self.lowest = self.lowest - nats, min(self.lowest, nats)
        self.waited = 0 if gain > self.recipe.least_gain else self.waited + 1
        is_over = self.waited >= self.recipe.patience
        if is_over:
            self.waited, self.cuts, self.scale = 0, self.cuts + 1, self.scale / 4
        return gain > 0, is_over


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.train_backbone is False:
        untie_decoder(model)
    if recipe.train_backbone is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(recipe.train_backbone or name.startswith("lm_head."))
    new, old = [], []
    for name, parameter in trained_parameters(model):
        (new if ".prior." in name or ".shift." in name else old).append(parameter)
    head_rate = recipe.head_learning_rate
    groups = [
        {"params": old, "peak": recipe.learning_rate},
        {"params": new, "peak": head_rate / model.mos_head.latent_scale if head_rate else recipe.learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=recipe.weight_decay)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def untie_decoder(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def take_step(model: PreTrainedModel, inputs: Inputs, optimizer: torch.optim.Optimizer, scale: float) -> Tensor:
    """Makes one step; the result is the loss before it."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    optimizer.zero_grad()
    loss: Tensor = model(**inputs).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yields the indices of batches epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)
