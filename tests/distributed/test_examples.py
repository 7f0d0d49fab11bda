"""Checks examples/accelerate: Accelerate accepts each config, and the training script runs with the one for CPUs."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from fresh_processes import PROGRAMS, fork_server
from processes import WORLD_SIZE, free_port, run_script
from tokenizers import ByteLevelBPETokenizer
from training_steps import assert_close_to
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_mos import MoSForCausalLM

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
SENTENCES = [f"{i} times {i} is {i * i}." for i in range(300)]

EXPECTED = {
    "one_gpu": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "ddp": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "cpu_ddp": {"ACCELERATE_MIXED_PRECISION": "no"},
    "fsdp2_two_nodes": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    },
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}


def test_every_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_takes_the_config(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = {"one_gpu": 1, "cpu_ddp": WORLD_SIZE, "fsdp2_two_nodes": 16}.get(name, 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == processes
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    elif processes > 1:
        assert arguments.multi_gpu or arguments.use_fsdp
        environment = prepare_multi_gpu_env(arguments)
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    assert {key: environment.get(key) for key in EXPECTED[name]} == EXPECTED[name]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=280, special_tokens=["<|end|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_training_script_shares_the_weights(tmp_path: Path, base: Path) -> None:
    text, mixture = tmp_path / "text.txt", tmp_path / "mixture"
    text.write_text("\n".join(SENTENCES))
    MoSForCausalLM.from_causal_lm(base, num_mixtures=2).save_pretrained(mixture)
    script = ROOT / "examples" / "train_clm.py"
    options = ["--tokenizer", base, "--optim", "sgd", "--use-cpu", "--model", mixture, "--train-file", text]
    options += ["--max-steps", 3, "--learning-rate", 0.1, "--report-to", "none", "--save-strategy", "no"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    arguments = [*options, "--output-dir", alone, "--per-device-train-batch-size", 4]
    process = fork_server(*PROGRAMS).run(str(script), *arguments, kind="script")
    assert process.returncode == 0, process.stderr
    run_script(script, *options, "--output-dir", shared, "--per-device-train-batch-size", 2, "--fsdp-size", 2)
    expected = MoSForCausalLM.from_pretrained(alone)
    assert_close_to(expected, dict(MoSForCausalLM.from_pretrained(shared).named_parameters()), tolerance=1e-5)
    before = MoSForCausalLM.from_pretrained(mixture).lm_head.weight
    assert (expected.lm_head.weight - before).abs().max() > 1e-3


def test_the_training_script_runs_in_two_processes(tmp_path: Path, base: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n".join(SENTENCES))
    launch = ["--config_file", CONFIGS / "cpu_ddp.yaml", "--main_process_port", free_port()]
    options = {
        "--model": base,
        "--train-file": text,
        "--output-dir": out,
        "--max-steps": 4,
        "--logging-steps": 2,
        "--per-device-train-batch-size": 2,
        "--report-to": "none",
    }
    process = fork_server(*PROGRAMS).run(
        "accelerate.commands.launch",
        *(*launch, ROOT / "examples" / "train_clm.py", *(word for option in options.items() for word in option)),
        kind="module",
        cwd=ROOT,
        environment={"ACCELERATE_USE_CPU": "true"},
    )
    assert process.returncode == 0, process.stderr
    assert f"{WORLD_SIZE} x CPU" in (out / "README.md").read_text()
    MoSForCausalLM.from_pretrained(out)
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert all("mixture_entropy" in entry for entry in logs if "loss" in entry)
