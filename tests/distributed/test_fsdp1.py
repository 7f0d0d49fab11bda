"""Checks torch's FullyShardedDataParallel, the older FSDP: two processes train as one does, by the fused loss."""

import functools
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from processes import WORLD_SIZE, run_on_two
from test_fsdp2 import layers_of
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from training_steps import MODELS, STEPS, assert_like_one_process, make_model, save_results, train

from hf_mos import MoSLMHead, mos_cross_entropy
from hf_mos.remote_code import mos_head

# The head is wrapped by itself, or with the embedding and the norm in the model's own wrapper, as a tied one must be.
CASES = [(name, False) for name in MODELS] + [(name, True) for name in MODELS if name not in ("gpt2", "llama-tied")]


def train_sharded(folder: str) -> None:
    warnings.filterwarnings("ignore", module="torch")  # of its own age, and of a group of processes on the CPU
    rank = torch.distributed.get_rank()
    for name, wraps_head in CASES:
        model = make_model(name)
        classes = {type(layers_of(model)[0])} | ({MoSLMHead} if wraps_head else set())
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
        sharded = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
        assert isinstance(model.lm_head, FullyShardedDataParallel) == wraps_head
        with mock.patch.object(mos_head, "mos_cross_entropy", wraps=mos_cross_entropy) as fused:
            losses = train(sharded, rank, WORLD_SIZE)
        assert fused.call_count == STEPS
        with FullyShardedDataParallel.summon_full_params(sharded):
            named = {key.replace("_fsdp_wrapped_module.", ""): weight for key, weight in sharded.named_parameters()}
            if rank == 0:
                save_results(folder, f"{name}-{wraps_head}", losses, named)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp1")
    run_on_two(train_sharded, folder)
    return folder


@pytest.mark.parametrize(("name", "wraps_head"), CASES)
def test_trains_as_one_process(trained: Path, name: str, wraps_head: bool) -> None:
    assert_like_one_process(trained, f"{name}-{wraps_head}", make_model(name))
