"""Checks DeepSpeed ZeRO-2 and ZeRO-3 in the Trainer: two processes train as one does and save one whole checkpoint."""

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import DistributedType, PartialState
from extras import missing_requirements
from helpers import logged_losses, run_python, tiny_causal_lm
from processes import WORLD_SIZE, run_on_two
from training_steps import (
    ACCUMULATION,
    MODELS,
    STEPS,
    assert_close_to,
    load_results,
    run_trainer,
    save_results,
)

from hf_mos import MoSForCausalLM, mos_cross_entropy
from hf_mos.remote_code import mos_head
from hf_mos.training.callbacks import MixtureUsage

STAGES = (2, 3)
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}


def config_of(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,  # the weights of a tiny model too are sharded
        },
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }


def start_deepspeed() -> None:
    """Accelerate names no backend for DeepSpeed on a machine without an accelerator, and would run one process."""
    mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.NO)).start()
    for module in ("torch", "deepspeed", "accelerate"):
        warnings.filterwarnings("ignore", module=module)  # DeepSpeed calls what torch has deprecated
    # Otherwise each new environment compiles an operator in C++, which only inference uses.
    mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None).start()


def train_and_save(folder: str, stage: str) -> None:
    start_deepspeed()
    for name in MODELS:
        with mock.patch.object(mos_head, "mos_cross_entropy", wraps=mos_cross_entropy) as fused:
            trainer = run_trainer(
                folder, name, WORLD_SIZE, use_cpu=False, deepspeed=config_of(int(stage)), usage=MixtureUsage()
            )
        assert all("mixture_entropy" in entry for entry in trainer.state.log_history if "loss" in entry)
        assert trainer.args.world_size == WORLD_SIZE
        assert trainer.model_wrapped.zero_optimization_stage() == int(stage)
        assert fused.call_count == STEPS * ACCUMULATION
        parameters = list(trainer.model.parameters())
        assert all((parameter.numel() == 0) == (stage == "3") for parameter in parameters)
        trainer.save_model()
        if torch.distributed.get_rank() == 0:
            save_results(folder, name, logged_losses(trainer), {})
    if stage == "3":
        load_sharded(folder, trainer.args.output_dir)


def load_sharded(folder: str, saved: str) -> None:
    """While a configuration for ZeRO-3 is alive, a model is sharded when it is made; also one that is converted."""
    plain = f"{folder}/plain"
    if torch.distributed.get_rank() == 0:
        tiny_causal_lm("llama").save_pretrained(plain)
    torch.distributed.barrier()
    model = MoSForCausalLM.from_pretrained(saved)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    converted = MoSForCausalLM.from_causal_lm(plain, num_mixtures=3)
    assert converted.lm_head.weight.numel() == 0
    trainer = run_trainer(folder, "converted", WORLD_SIZE, model=converted, use_cpu=False, deepspeed=config_of(3))
    trainer.save_model()


@pytest.fixture(scope="module", params=STAGES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := missing_requirements("distributed"):
        pytest.fail(f"expected {', '.join(missing)}, which `make test-distributed` installs", pytrace=False)
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    run_on_two(train_and_save, folder, request.param, environment=ENVIRONMENT)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_trains_as_one_process_and_saves_whole_weights(trained: Path, tmp_path: Path, name: str) -> None:
    alone = run_trainer(tmp_path, name)
    losses, _ = load_results(trained, name)
    torch.testing.assert_close(losses, logged_losses(alone), rtol=0, atol=1e-6)
    saved = trained / f"{name}-out"
    assert_close_to(alone.model, dict(MoSForCausalLM.from_pretrained(saved).named_parameters()))


def test_a_save_loads_in_a_fresh_process(trained: Path, tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__name__, model.generate(torch.tensor([[3, 4]]), max_new_tokens=2).shape)"
    )
    printed = run_python(code, trained / f"{MODELS[-1]}-out", cache=tmp_path)
    assert printed.splitlines()[-1] == "MoSLlamaForCausalLM torch.Size([1, 4])"
