"""Checks lm-eval on a mixture loaded with trust_remote_code: scores and text equal the model's own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mos.tools.evaluate import evaluate

PAIRS = [("Sentence 3 says", " that 3 times 3 is 9"), ("", "Sentence 7"), ("Sentence 5 says that 5 times 5", " is")]
PROMPT = "Sentence 3 says"
TEXTS = ["Sentence 3 says that 3 times 3 is 9. " * 12, "Sentence 4 says nothing."]  # the first is over one window
TASK = {
    "task": "sentences",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
}

# Where hf_mos cannot be imported.
RUN = """
import sys
sys.modules["hf_mos"] = None
import json
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

folder, pairs, texts, prompt, task = map(json.loads, sys.argv[1:])
model = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", batch_size=2)

def ask(kind, requests):
    return getattr(model, kind)([Instance(kind, {}, tuple(request), i) for i, request in enumerate(requests)])

print(json.dumps({
    "class": type(model.model).__module__,
    "max_length": model.max_length,
    "loglikelihood": ask("loglikelihood", pairs),
    "rolling": ask("loglikelihood_rolling", [(text,) for text in texts]),
    "generated": ask("generate_until", [(prompt, {"max_gen_toks": 8, "until": [], "do_sample": False})]),
    "task": simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["results"]["sentences"],
}))
"""


def ask_lm_eval(folder: Path, cache: Path) -> dict[str, Any]:
    rows = cache / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(rows)}}}
    questions = [json.dumps(question) for question in (str(folder), PAIRS, TEXTS, PROMPT, task)]
    environment = os.environ | {"HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", RUN, *questions],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cache,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ask_lm_eval(mixture, tmp_path_factory.mktemp("lm-eval"))


@pytest.fixture(scope="module")
def model(mixture: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(mixture).eval()


@pytest.fixture(scope="module")
def tokenizer(mixture: Path) -> Any:
    return AutoTokenizer.from_pretrained(mixture)


def test_it_is_the_code_beside_the_weights(answers: dict[str, Any], model: Any) -> None:
    assert answers["class"].startswith("transformers_modules.")
    assert answers["max_length"] == model.config.max_position_embeddings == 128


def test_loglikelihood_is_our_own_sum(answers: dict[str, Any], model: Any, tokenizer: Any) -> None:
    for (context, continuation), (found, found_greedy) in zip(PAIRS, answers["loglikelihood"], strict=True):
        start = tokenizer(context).input_ids or [tokenizer.bos_token_id]
        end = tokenizer(continuation).input_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
        expected = -F.nll_loss(log_probs, torch.tensor(end), reduction="sum")
        assert found == pytest.approx(expected.item(), rel=1e-5)
        assert found_greedy == (log_probs.argmax(-1).tolist() == end)


def test_rolling_loglikelihood_is_that_of_evaluate(answers: dict[str, Any], model: Any, tokenizer: Any) -> None:
    window = model.config.max_position_embeddings
    assert len(tokenizer(TEXTS[0]).input_ids) > window
    for text, found in zip(TEXTS, answers["rolling"], strict=True):
        assert -found == pytest.approx(evaluate(model, tokenizer, [text], window=window, stride=window).nats, rel=1e-5)


def test_a_task_of_perplexity(answers: dict[str, Any], model: Any, tokenizer: Any) -> None:
    ours = evaluate(model, tokenizer, TEXTS, window=128, stride=128)
    assert answers["task"]["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, rel=1e-5)
    assert answers["task"]["byte_perplexity,none"] == pytest.approx(2**ours.bits_per_byte, rel=1e-5)


def test_generation_is_greedy_generation(answers: dict[str, Any], model: Any, tokenizer: Any) -> None:
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    generated = model.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :]
    assert answers["generated"] == [tokenizer.decode(generated)]
