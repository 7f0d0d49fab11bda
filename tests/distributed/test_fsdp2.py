"""Checks FSDP2 in torch, transformers and Accelerate: two processes with sharded weights train as one does."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from helpers import run_python
from processes import WORLD_SIZE, run_on_two
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from training_steps import (
    LEARNING_RATE,
    MODELS,
    STEPS,
    assert_close_to,
    assert_like_one_process,
    joint_batch,
    load_results,
    make_model,
    save_results,
    share_of,
    take_steps,
    train,
)
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import consolidate_distributed_checkpoint

from hf_mos import MoSForCausalLM, mos_cross_entropy
from hf_mos.remote_code import mos_head
from hf_mos.remote_code.mos_checkpoint import whole_state_dict

ENGINES = ("torch", "accelerate", "transformers")


def layers_of(model: MoSForCausalLM) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def shard(model: MoSForCausalLM, **options: Any) -> MoSForCausalLM:
    """Layers, head and the rest. A tied weight is in one group with the embedding, as torch asks for."""
    for layer in layers_of(model):
        fully_shard(layer, **options)
    is_tied = model.config.tie_word_embeddings
    fully_shard([model.get_input_embeddings(), model.lm_head] if is_tied else model.lm_head, **options)
    return fully_shard(model, **options)


def shard_as_accelerate_does(model: MoSForCausalLM) -> MoSForCausalLM:
    """Accelerate itself turns a config for FSDP on the CPU into DDP."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
    )
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=torch.distributed.init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("dp_shard",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
        mixed_precision="no",
        is_main_process=torch.distributed.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def load_sharded(folder: Path, name: str) -> MoSForCausalLM:
    if torch.distributed.get_rank() == 0:
        make_model(name).save_pretrained(folder)
    torch.distributed.barrier()
    plan = {"transformer.h.*": "free_full_weight"} if name == "gpt2" else None
    config = DistributedConfig(fsdp_size=WORLD_SIZE, fsdp_plan=plan)
    return MoSForCausalLM.from_pretrained(folder, distributed_config=config).train()


@contextlib.contextmanager
def every_loss_is_fused(steps: int) -> Iterator[None]:
    """Each of the losses is the one without a vocabulary-wide tensor, and it sees the decoder's weight whole."""
    with mock.patch.object(mos_head, "mos_cross_entropy", wraps=mos_cross_entropy) as fused:
        yield
    weights = [call.args[2] for call in fused.call_args_list]
    assert [type(weight) for weight in weights] == [torch.nn.Parameter] * steps
    assert all(weight.shape == (97, 32) for weight in weights)


def train_and_save(folder: str) -> None:
    rank = torch.distributed.get_rank()
    for engine in ENGINES:
        for name in MODELS:
            if engine == "torch":
                model = shard(make_model(name))
            elif engine == "accelerate":
                model = shard_as_accelerate_does(make_model(name))
            else:
                model = load_sharded(Path(folder, "whole", name), name)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            with every_loss_is_fused(STEPS):
                losses = train(model, rank, WORLD_SIZE)
            model.save_pretrained(f"{folder}/{engine}-{name}-saved")
            weights = whole_state_dict(model)
            if rank == 0:
                save_results(folder, f"{engine}-{name}", losses, {k: weights[k] for k, _ in model.named_parameters()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    run_on_two(train_and_save, folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_one_process(trained: Path, engine: str, name: str) -> None:
    assert_like_one_process(trained, f"{engine}-{name}", make_model(name))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_a_save_is_whole(trained: Path, engine: str, name: str) -> None:
    """It holds its own code, and the weights of all processes."""
    _, weights = load_results(trained, f"{engine}-{name}")
    saved = trained / f"{engine}-{name}-saved"
    assert_close_to(MoSForCausalLM.from_pretrained(saved), weights, tolerance=0.0)
    assert (saved / "modeling_mos.py").is_file()
    assert not [path for path in saved.iterdir() if "fsdp" in path.name]


def test_a_save_loads_without_hf_mos(trained: Path, tmp_path: Path) -> None:
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__name__)"
    )
    printed = run_python(code, trained / f"transformers-{MODELS[-1]}-saved", cache=tmp_path)
    assert printed.split()[-1] == "MoSLlamaForCausalLM"


# ------------------------------------------------------------------------------------------------- sharded checkpoints


def new_optimizer(model: MoSForCausalLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def resume(folder: str) -> None:
    rank = torch.distributed.get_rank()
    for name in MODELS:
        checkpoint = f"{folder}/{name}-dcp"
        model = shard(make_model(name))
        optimizer = new_optimizer(model)
        losses = take_steps(model, optimizer, range(2), rank, WORLD_SIZE)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=checkpoint)
        losses += take_steps(model, optimizer, range(2, STEPS), rank, WORLD_SIZE)

        with torch.no_grad():
            other = make_model(name)
            for parameter in other.parameters():
                parameter.zero_()
        other = shard(other)
        optimizer = new_optimizer(other)
        weights, state = get_state_dict(other, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=checkpoint)
        set_state_dict(other, optimizer, model_state_dict=weights, optim_state_dict=state)
        resumed = take_steps(other, optimizer, range(2, STEPS), rank, WORLD_SIZE)
        assert resumed == losses[2:]
        for (key, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(ours.to_local(), theirs.to_local()), key
        whole = whole_state_dict(model)
        if rank == 0:
            save_results(folder, f"{name}-resumed", losses, {key: whole[key] for key, _ in model.named_parameters()})
            model.save_pretrained(f"{folder}/{name}-saved", state_dict=whole)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    run_on_two(save_and_resume, folder)
    return folder


def test_a_sharded_checkpoint_resumes_to_the_bit(saved: Path) -> None:
    for name in MODELS:
        _, weights = load_results(saved, f"{name}-resumed")
        assert_close_to(MoSForCausalLM.from_pretrained(saved / f"{name}-saved"), weights, tolerance=0.0)


def save_sharded(folder: str) -> None:
    rank = torch.distributed.get_rank()
    for name in MODELS[1:]:
        model = load_sharded(Path(folder, "whole", name), name)
        losses = train(model, rank, WORLD_SIZE)
        model.save_pretrained(f"{folder}/{name}-shards", distributed_checkpoint=True)
        config = DistributedConfig(fsdp_size=WORLD_SIZE)
        again = MoSForCausalLM.from_pretrained(f"{folder}/{name}-shards", distributed_config=config)
        for (key, ours), theirs in zip(again.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(ours.to_local(), theirs[1].to_local()), key
        whole = whole_state_dict(model)
        if rank == 0:
            save_results(folder, name, losses, {key: whole[key] for key, _ in model.named_parameters()})


def train_in_bf16() -> None:
    """Mixed precision does not round the loss."""
    rank = torch.distributed.get_rank()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    for name in MODELS:
        model = make_model(name)
        for layer in layers_of(model):
            fully_shard(layer, mp_policy=policy)
        tied = model.config.tie_word_embeddings
        fully_shard([model.get_input_embeddings(), model.lm_head] if tied else model.lm_head, mp_policy=policy)
        fully_shard(model)  # the loss is what the head's own group lets through
        batch = share_of(joint_batch(0), rank, WORLD_SIZE)
        loss = model(**batch, num_items_in_batch=1000).loss
        assert loss.dtype == torch.float32
        loss.backward()
        expected = make_model(name).bfloat16()(**batch, num_items_in_batch=1000).loss
        # A sum of this size would be rounded to 1 / 256 of it.
        assert abs(loss - expected) / expected < 1e-3


def save_and_resume(folder: str) -> None:
    resume(folder)
    save_sharded(folder)
    train_in_bf16()


def test_a_sharded_checkpoint_of_transformers_merges(saved: Path) -> None:
    for name in MODELS[1:]:
        shards, merged = saved / f"{name}-shards", saved / f"{name}-merged"
        assert len(list(shards.glob("shard-*.safetensors"))) == WORLD_SIZE
        consolidate_distributed_checkpoint(shards, merged)
        for path in (*shards.glob("*.json"), *shards.glob("*.py")):
            (merged / path.name).write_bytes(path.read_bytes())
        _, weights = load_results(saved, name)
        assert_close_to(MoSForCausalLM.from_pretrained(merged), weights, tolerance=0.0)
