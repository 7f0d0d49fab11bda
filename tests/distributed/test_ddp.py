"""Checks DistributedDataParallel, alone and in the Trainer: two processes train as one does on the joint batch."""

from pathlib import Path

import pytest
import torch
from helpers import logged_losses
from processes import WORLD_SIZE, run_on_two
from torch.nn.parallel import DistributedDataParallel
from training_steps import (
    MODELS,
    assert_close_to,
    assert_like_one_process,
    load_results,
    make_model,
    run_trainer,
    save_results,
    train,
)


def plain_ddp(folder: str) -> None:
    rank = torch.distributed.get_rank()
    for name in MODELS:
        model = make_model(name)
        losses = train(DistributedDataParallel(model), rank, WORLD_SIZE)
        save_results(folder, f"{name}-{rank}", losses, dict(model.named_parameters()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run_on_two(plain_ddp, folder)
    return folder


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
@pytest.mark.parametrize("name", MODELS)
def test_ddp(plain: Path, name: str, rank: int) -> None:
    assert_like_one_process(plain, f"{name}-{rank}", make_model(name))


def trainer_on_two(folder: str) -> None:
    rank = torch.distributed.get_rank()
    for name in MODELS:
        trainer = run_trainer(folder, name, WORLD_SIZE)
        assert trainer.args.world_size == WORLD_SIZE
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        save_results(folder, f"{name}-{rank}", logged_losses(trainer), dict(trainer.model.named_parameters()))


@pytest.fixture(scope="module")
def through_trainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    run_on_two(trainer_on_two, folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_trainer(through_trainer: Path, tmp_path: Path, name: str) -> None:
    alone = run_trainer(str(tmp_path), name, world_size=1)
    assert alone.args.world_size == 1
    losses, weights = load_results(through_trainer, f"{name}-0")
    torch.testing.assert_close(losses, logged_losses(alone), rtol=0, atol=1e-6)
    assert_close_to(alone.model, weights)
    assert_close_to(alone.model, load_results(through_trainer, f"{name}-1")[1])
