"""Checks that vLLM predicts as transformers does, for each architecture and each kind of head."""

from collections.abc import Callable
from typing import Any

import pytest
from helpers import random_tokens
from models import CASES, NEW_TOKENS, Reference, make_mixture, reference_of

TOLERANCE = 1e-4  # in fp32


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Made before any engine: vLLM's transformers backend changes classes of transformers."""
    prompts = random_tokens(batch=3, length=18)
    return {
        name: reference_of(make_mixture(model, **options), tmp_path_factory.mktemp("model"), prompts)
        for name, (model, options) in CASES.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_predicts_as_transformers_does(
    case: str, references: dict[str, Reference], engine: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    reference = references[case]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=5, prompt_logprobs=3, detokenize=False)
    with engine(reference.folder) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in reference.prompts], params, use_tqdm=False)
    assert len(outputs) == len(reference.prompts)
    for i, output in enumerate(outputs):
        assert [*output.prompt_token_ids, *output.outputs[0].token_ids] == reference.tokens[i]
        compared = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(compared) == len(reference.tokens[i]) - 1
        for position, entries in enumerate(compared):
            assert len(entries) >= 3
            for token, entry in entries.items():
                expected = float(reference.log_probs[i, position, token])
                assert entry.logprob == pytest.approx(expected, abs=TOLERANCE), (i, position, token)
