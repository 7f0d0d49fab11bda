"""Checks that what vLLM does with logits and with batches is right for a mixture."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB_SIZE, random_tokens
from models import NEW_TOKENS, Reference, make_mixture, reference_of, save_tokenizer

TOLERANCE = 1e-4
BATCH = 8
LONG = 100  # tokens: more than one prefill takes, and several blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a mixture, with a tokenizer."""
    folder = tmp_path_factory.mktemp("features")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def short(folder: Path) -> Reference:
    return reference_of(make_mixture("llama"), folder, random_tokens(batch=BATCH, length=12))


@pytest.fixture(scope="module")
def long(folder: Path) -> Reference:
    return reference_of(make_mixture("llama"), folder, random_tokens(batch=2, length=LONG, seed=1))


@pytest.fixture(scope="module")
def penalised(folder: Path) -> Reference:
    prompts = random_tokens(batch=BATCH, length=12)
    return reference_of(make_mixture("llama"), folder, prompts, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def llm(short: Reference, long: Reference, penalised: Reference, engine: Callable[..., Any]) -> Iterator[Any]:
    options = {
        "skip_tokenizer_init": False,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 32,
        "max_logprobs": VOCAB_SIZE,
    }
    with engine(short.folder, **options) as llm:
        yield llm


def generate(llm: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(**{"temperature": 0, "max_tokens": NEW_TOKENS} | options)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]


def test_eight_prompts_at_once(llm: Any, short: Reference) -> None:
    outputs = generate(llm, short.prompts)
    assert tokens_of(outputs) == short.tokens
    assert all(len(output.outputs[0].token_ids) == NEW_TOKENS for output in outputs)


def test_a_prompt_in_parts_and_again_from_the_cache(llm: Any, long: Reference) -> None:
    fresh = generate(llm, long.prompts)
    assert [output.num_cached_tokens for output in fresh] == [0, 0]
    assert tokens_of(fresh) == long.tokens
    cached = generate(llm, long.prompts)
    assert [output.num_cached_tokens for output in cached] == [96, 96]  # whole blocks
    assert tokens_of(cached) == long.tokens


def test_log_probs_of_a_prompt_in_parts(llm: Any, long: Reference) -> None:
    outputs = generate(llm, long.prompts, max_tokens=1, prompt_logprobs=0)
    for i, output in enumerate(outputs):
        pairs = list(zip(long.prompts[i], output.prompt_logprobs, strict=True))[1:]  # the first token has none
        given = [entries[token].logprob for token, entries in pairs]
        targets = torch.tensor(long.prompts[i][1:])
        expected = long.log_probs[i, : LONG - 1].gather(1, targets.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(given), expected, rtol=0, atol=TOLERANCE)


def test_log_probs_of_the_whole_vocabulary_sum_to_one(llm: Any, short: Reference) -> None:
    (output,) = generate(llm, short.prompts[:1], logprobs=VOCAB_SIZE)
    for step, entries in enumerate(output.outputs[0].logprobs):
        assert entries.keys() == set(range(VOCAB_SIZE))
        log_probs = torch.tensor([entries[token].logprob for token in range(VOCAB_SIZE)])
        assert float(log_probs.exp().sum()) == pytest.approx(1, abs=1e-5)
        expected = short.log_probs[0, len(short.prompts[0]) - 1 + step]
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=TOLERANCE)


def test_repetition_penalty(llm: Any, penalised: Reference, short: Reference) -> None:
    assert penalised.tokens != short.tokens
    assert tokens_of(generate(llm, penalised.prompts, repetition_penalty=1.3)) == penalised.tokens


def test_structured_output(llm: Any, short: Reference) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    allowed = [5, 8, 9]
    choice = StructuredOutputsParams(choice=[f"w{token}" for token in allowed])
    outputs = generate(llm, short.prompts, max_tokens=1, structured_outputs=choice)
    last = len(short.prompts[0]) - 1
    expected = [allowed[int(log_probs[last, allowed].argmax())] for log_probs in short.log_probs]
    assert [output.outputs[0].token_ids[0] for output in outputs] == expected
    assert len(set(expected)) > 1


def test_sampling_follows_the_mixture(llm: Any, short: Reference) -> None:
    """Not one of its components: among the two likeliest classes, as often as their probabilities say."""
    count = 400
    (output,) = generate(llm, short.prompts[:1], temperature=1, top_k=2, n=count, max_tokens=1)
    log_probs, tokens = short.log_probs[0, len(short.prompts[0]) - 1].topk(2)
    share = sum(completion.token_ids[0] == int(tokens[0]) for completion in output.outputs) / count
    expected = float(log_probs.softmax(-1)[0])
    assert {completion.token_ids[0] for completion in output.outputs} <= set(tokens.tolist())
    assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
