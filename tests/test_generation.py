"""Checks generation: the causal LM's tokens before training, and greedy decoding's tokens after it."""

from typing import Any

import pytest
import torch
from cases import cases
from helpers import (
    BACKBONES,
    HEADS,
    PAD,
    VOCAB_SIZE,
    WITH_ATTENTION,
    greedy,
    random_tokens,
    tiny_causal_lm,
    tiny_mos,
)
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
    set_seed,
)

from hf_mos import MoSForCausalLM

NEW = 8


def without_mixture(name: str) -> tuple[MoSForCausalLM, Any]:
    """A model as it is converted, and the causal LM that it was."""
    original = tiny_causal_lm(name)
    return MoSForCausalLM.from_causal_lm(original, num_mixtures=3), original


def teacher_forced(model: MoSForCausalLM, tokens: Tensor) -> Tensor:
    """Greedy decoding with no cache: the whole sequence again for each token."""
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", [*BACKBONES, "bert", "cohere"])
def test_greedy_with_cache_is_greedy_without(name: str, head: dict[str, Any]) -> None:
    model = tiny_mos(name, **head)
    tokens = random_tokens()
    expected = teacher_forced(model, tokens)
    assert torch.equal(greedy(model, tokens, NEW), expected)
    assert torch.equal(greedy(model, tokens, NEW, use_cache=False), expected)


STRATEGIES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 0},
    "top-k and top-p": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "min-p and typical": {"do_sample": True, "min_p": 0.05, "typical_p": 0.95},
    "beam": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several sequences": {"num_beams": 4, "num_return_sequences": 3},
    "no repetition": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [9]},
    "forced end": {"forced_eos_token_id": 4, "eos_token_id": 4},
    "guidance": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0, context_width=1)},
    "sequence bias": {"sequence_bias": [[[11], 4.0]]},
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    cases(BACKBONES, STRATEGIES, quick=[(name, strategy) for name in ("llama", "gemma2") for strategy in STRATEGIES]),
)
def test_strategies_draw_the_tokens_of_the_causal_lm(name: str, strategy: str) -> None:
    generated = []
    for model in without_mixture(name):
        set_seed(0)
        generated.append(model.generate(random_tokens(), max_new_tokens=NEW, **STRATEGIES[strategy]))
    assert torch.equal(*generated)


@pytest.mark.parametrize("name", WITH_ATTENTION)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_cache_implementations(name: str, cache: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    generated = greedy(model, tokens, NEW, cache_implementation=cache, disable_compile=True)
    assert torch.equal(generated, greedy(model, tokens, NEW))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_quantized_cache(name: str) -> None:
    pytest.importorskip("optimum.quanto")
    config = {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 8, "axis_key": 0, "axis_value": 0}
    generated = []
    for model in without_mixture(name):
        tokens = greedy(model, random_tokens(), NEW, cache_implementation="quantized", cache_config=config)
        generated.append(tokens)
    assert torch.equal(*generated)


@pytest.mark.parametrize("name", WITH_ATTENTION)
@pytest.mark.parametrize("assistant", ["causal LM", "mixture", "itself"])
def test_assisted_decoding_is_greedy(name: str, assistant: str) -> None:
    model = tiny_mos(name)
    assistants = {"causal LM": tiny_causal_lm(name, seed=1), "mixture": tiny_mos(name, seed=1), "itself": model}
    tokens = random_tokens(1)
    expected = greedy(model, tokens, NEW)
    assert torch.equal(greedy(model, tokens, NEW, assistant_model=assistants[assistant]), expected)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_assists_a_causal_lm(name: str) -> None:
    original = tiny_causal_lm(name)
    tokens = random_tokens(1)
    assert torch.equal(
        greedy(original, tokens, NEW, assistant_model=tiny_mos(name, seed=1)), greedy(original, tokens, NEW)
    )


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_prompt_lookup_is_greedy(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens(1, 6).repeat(1, 2)
    assert torch.equal(greedy(model, tokens, NEW, prompt_lookup_num_tokens=2), greedy(model, tokens, NEW))


@pytest.mark.parametrize("name", BACKBONES)
def test_inputs_embeds_alone(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    embeddings = model.get_input_embeddings()(tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(input_ids=tokens).logits)
    generated = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generated, greedy(model, tokens, NEW)[:, tokens.shape[1] :])


@pytest.mark.filterwarnings("ignore:.*Use .cache. instead:FutureWarning")  # the newest name of past_key_values
@pytest.mark.parametrize("name", BACKBONES)
def test_continues_from_a_cache(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens(length=10)
    field = "cache_params" if name == "mamba" else "past_key_values"
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :6], use_cache=True)
        cache = {field: getattr(first, field)}
        for position in range(6, 10):  # state-space caches take one token at a time
            step = model(input_ids=tokens[:, position : position + 1], use_cache=True, **cache)
            torch.testing.assert_close(step.logits[:, 0], whole[:, position], atol=1e-4, rtol=1e-4)
            cache = {field: getattr(step, field)}


@pytest.mark.filterwarnings("ignore:.*Use .cache. instead:FutureWarning")  # the newest name of past_key_values
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_generates_on_from_the_cache_of_an_earlier_call(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    first = greedy(model, tokens, 4, return_dict_in_generate=True)
    second = greedy(model, first.sequences, 4, past_key_values=first.past_key_values)
    assert torch.equal(second, greedy(model, tokens, 8))


@pytest.mark.parametrize("name", BACKBONES)
def test_left_padding_changes_nothing(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    padded = torch.cat([torch.full((2, 3), PAD), tokens], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(tokens)], dim=1)
    generated = greedy(model, padded, NEW, attention_mask=mask)
    assert torch.equal(generated[:, 3:], greedy(model, tokens, NEW))


@pytest.mark.parametrize("name", BACKBONES)
def test_scores_and_logits(name: str) -> None:
    model = tiny_mos(name)
    tokens = random_tokens()
    outputs = greedy(model, tokens, NEW, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert len(outputs.scores) == len(outputs.logits) == NEW
    with torch.no_grad():
        log_probs = model(input_ids=outputs.sequences).logits[:, tokens.shape[1] - 1 : -1]
    generated = torch.stack(outputs.logits, dim=1).log_softmax(-1)
    torch.testing.assert_close(generated, log_probs, atol=1e-4, rtol=1e-4)
    transitions = model.compute_transition_scores(outputs.sequences, outputs.scores, normalize_logits=True)
    chosen = outputs.sequences[:, tokens.shape[1] :].unsqueeze(-1)
    torch.testing.assert_close(transitions, log_probs.gather(-1, chosen).squeeze(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attentions_and_hidden_states(name: str) -> None:
    model = tiny_mos(name)
    model.set_attn_implementation("eager")
    outputs = greedy(
        model,
        random_tokens(),
        2,
        return_dict_in_generate=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert len(outputs.attentions) == len(outputs.hidden_states) == 2
    assert len(outputs.attentions[0]) == 2
    assert len(outputs.hidden_states[0]) == 3


def test_temperature_acts_on_the_mixture() -> None:
    model = tiny_mos()
    tokens = random_tokens(1)
    outputs = model.generate(
        tokens,
        max_new_tokens=1,
        do_sample=True,
        temperature=0.5,
        top_k=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    torch.testing.assert_close(outputs.scores[0], outputs.logits[0] / 0.5)
    with torch.no_grad():
        log_probs = model(input_ids=tokens).logits[:, -1]
    torch.testing.assert_close(outputs.logits[0].log_softmax(-1), log_probs)


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_logits_processors_see_the_softmaxs_logits(name: str, options: dict[str, Any]) -> None:
    """A repetition penalty multiplies logits, so that their scale decides what it does."""
    softmax = tiny_causal_lm(name)
    model = MoSForCausalLM.from_causal_lm(softmax, **options)
    tokens = random_tokens()
    outputs = [
        greedy(
            m,
            tokens,
            NEW,
            repetition_penalty=1.7,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        for m in (softmax, model)
    ]
    assert outputs[0].sequences.equal(outputs[1].sequences)
    for name in ("logits", "scores"):
        expected, given = (torch.stack(getattr(output, name)) for output in outputs)
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_logits_of_generation_are_log_probabilities_times_the_mean_partition_function(options: dict[str, Any]) -> None:
    model = tiny_mos(**options)
    tokens = random_tokens()
    head = model.lm_head
    with torch.no_grad():
        hidden_states = model.head_inputs(input_ids=tokens)
        logits = model(input_ids=tokens, add_log_partition=True).logits
        log_probs = model(input_ids=tokens).logits
        log_weights, component_logits = head.components(hidden_states)
        partitions = component_logits.logsumexp(-1)
    mean_partition = 1 / (log_weights.exp() / partitions.exp()).sum(-1, keepdim=True)
    torch.testing.assert_close(logits, log_probs + mean_partition.log())
    with torch.enable_grad():
        torch.testing.assert_close(model(input_ids=tokens, add_log_partition=True).logits, logits)


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_of_generation_do_not_depend_on_the_path(name: str, options: dict[str, Any]) -> None:
    """With gradients they are computed in another way than without."""
    model, tokens = tiny_mos(name, **options), random_tokens()
    given = [model(input_ids=tokens, add_log_partition=True).logits.detach()]
    with torch.no_grad():
        given.append(model(input_ids=tokens, add_log_partition=True).logits)
    torch.testing.assert_close(*given, atol=1e-4, rtol=1e-5)


def test_logits_processors_can_forbid_tokens() -> None:
    def forbid_even(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 0, -torch.inf)

    tokens = random_tokens()
    generated = greedy(tiny_mos(), tokens, NEW, logits_processor=LogitsProcessorList([forbid_even]))
    assert (generated[:, tokens.shape[1] :] % 2 == 1).all()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB_SIZE)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", BACKBONES)
def test_streams(name: str, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture) -> None:
    model = tiny_mos(name)
    tokens = random_tokens(1)
    expected = tokenizer.decode(greedy(model, tokens, NEW)[0, tokens.shape[1] :])
    greedy(model, tokens, NEW, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == expected.split()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    greedy(model, tokens, NEW, streamer=streamer)
    assert "".join(streamer).split() == expected.split()


@pytest.mark.parametrize("name", BACKBONES)
def test_pipeline(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_mos(name)
    tokenizer.padding_side = "left"
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["w3 w4 w5 w6", "w7 w8"]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=PAD)
    outputs = generate(prompts, generation_config=config, batch_size=2, return_tensors=True)
    for prompt, (output,) in zip(prompts, outputs, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        generated = [token for token in output["generated_token_ids"] if token != PAD]
        assert generated == greedy(model, tokens, 4)[0].tolist()


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "mixtral"])
def test_continuous_batching_is_greedy(name: str) -> None:
    model = tiny_mos(name)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 7, 5)]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, block_size=32)
    results = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=small)
    assert len(results) == len(prompts)
    for result, prompt in zip(results.values(), prompts, strict=True):
        expected = greedy(model, torch.tensor([prompt]), NEW)[0, len(prompt) :]
        assert result.generated_tokens == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_generates_in_half_precision(name: str) -> None:
    model = tiny_mos(name).to(torch.bfloat16)
    assert greedy(model, random_tokens(), NEW).shape == (2, 12 + NEW)
