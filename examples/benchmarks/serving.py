"""Serving by vLLM: tokens per second of a mixture and of the softmax model, at several batch sizes.

    make test-vllm                                              # once: its environment has vLLM
    .venv-vllm/bin/python examples/benchmarks/serving.py
    .venv-vllm/bin/python examples/benchmarks/serving.py --hidden-size 768 --vocab-size 50257 --json

Each sequence has a prompt of 8 tokens and is then decoded greedily. The engines of a dtype run in turn in one process,
and each figure is a median.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from decode import away_from_its_start, backbone_config, name_of
from measure import report, time_in_turn
from transformers import LlamaForCausalLM
from transformers.utils import logging

from hf_mos import MoSForCausalLM

HEADS = ({"num_mixtures": 4, "shortlist_size": None}, {"num_mixtures": 16, "shortlist_size": 64})
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8, 32)  # sequences that are decoded together
PROMPT_TOKENS = 8


def save_models(folder: Path, hidden_size: int, vocab_size: int) -> dict[str, Path]:
    """Saves the softmax model and its mixtures; returns the folder of each."""
    softmax = LlamaForCausalLM(backbone_config(hidden_size, vocab_size))
    folders = {"softmax": folder / "softmax"}
    softmax.save_pretrained(folders["softmax"])
    for options in HEADS:
        model = MoSForCausalLM.from_causal_lm(softmax, **options)
        away_from_its_start(model.mos_head)
        folders[name_of(options)] = folder / str(len(folders))
        model.save_pretrained(folders[name_of(options)])
    return folders


def start(folder: Path, dtype: str, max_len: int) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        dtype=dtype,
        max_model_len=max_len,
        block_size=32,
        max_num_seqs=max(BATCHES),
        kv_cache_memory_bytes=256 * 2**20,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )


def decode(engine: Any, batch: int, vocab_size: int, new_tokens: int) -> None:
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist()
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == batch * new_tokens


def main(
    hidden_size: int = 256,
    vocab_size: int = 32000,
    new_tokens: int = 32,
    rounds: int = 7,
    threads: int = 1,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    # One process for all engines, so that they take turns, and its threads where the scheduler puts them.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR"}
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = {"hidden_size": hidden_size, "vocab_size": vocab_size, "new_tokens": new_tokens}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folders = save_models(Path(folder), hidden_size, vocab_size)
        for dtype in DTYPES:
            engines = {name: start(path, dtype, PROMPT_TOKENS + new_tokens) for name, path in folders.items()}
            calls = {
                (name, batch): lambda engine=engine, batch=batch: decode(engine, batch, vocab_size, new_tokens)
                for name, engine in engines.items()
                for batch in BATCHES
            }
            seconds = time_in_turn(calls, rounds)
            rows += [
                {"model": f"{name}, {dtype}"}
                | {f"tokens per second, {batch}": batch * new_tokens / seconds[name, batch] for batch in BATCHES}
                | {f"of the softmax, {batch}": seconds["softmax", batch] / seconds[name, batch] for batch in BATCHES}
                for name in engines
            ]
            for engine in engines.values():
                engine.llm_engine.engine_core.shutdown()
    report("Serving by vLLM", rows, settings, json_)


if __name__ == "__main__":
    typer.run(main)
