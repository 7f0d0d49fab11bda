"""Checks the numbers of `hf-mos inspect` against plain formulas in float64, and its JSON, tables and page."""

import json
import math
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import complaints, needs_chromium, requested
from commands import run_command
from helpers import LargestTensor, part_components, run_python, tiny_causal_lm, tiny_mos
from pydantic import TypeAdapter
from rich.console import Console
from screenshot import browser
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_mos import MoSForCausalLM
from hf_mos.tools.evaluate import evaluate
from hf_mos.tools.inspection.inspect_mixture import Inspection, inspect_mixture
from hf_mos.tools.inspection.page import render_page, save_page
from hf_mos.tools.inspection.tables import tables
from hf_mos.tools.inspection.token_texts import TokenTexts, running, visible

TEXT = "Naïve café: the cat sat on 😀 two mats.\n\tAnd  then?"
CORPUS = [f"The cat number {i} sat on mat {i * i % 7}, naïve as ever." for i in range(30)]
END = "<|end|>"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=290, special_tokens=[END], initial_alphabet=alphabet))


def sentence_piece() -> Tokenizer:
    """As Llama's: spaces are letters, what has no letter is bytes, and a space stands before all."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=END, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=330, special_tokens=[END, *bytes_]))


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=150, special_tokens=[END]))


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    trainer.show_progress = False
    tokenizer.train_from_iterator([*CORPUS, "a"], trainer)
    return tokenizer


TOKENIZERS = {"byte-level": byte_level, "sentence-piece": sentence_piece, "word-piece": word_piece}


def tokenizer_of(kind: str = "byte-level", **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[kind](), **special)


def mixture_for(tokenizer: PreTrainedTokenizerFast, backbone: str = "llama", **options: Any) -> MoSForCausalLM:
    model = MoSForCausalLM.from_causal_lm(
        tiny_causal_lm(backbone, vocab_size=len(tokenizer)), **({"num_mixtures": 3} | options)
    )
    part_components(model)
    return model


# ----------------------------------------------------------------------------------------------- the numbers of a text


def predicted_by_hand(model: MoSForCausalLM, token_ids: list[int]) -> dict[str, torch.Tensor]:
    """Every probability at every position of (prefix, text), with the formulas of the paper in probability space."""
    head = model.lm_head
    with torch.no_grad():
        h = model.head_inputs(input_ids=torch.tensor([token_ids]))[0].double()  # mamba's are fp32 in any model

        def logits_of(latents: torch.Tensor) -> torch.Tensor:
            logits = latents @ head.weight.T + (0 if head.bias is None else head.bias)
            return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

        weights = (head.latent_scale * h @ head.prior.weight.T).softmax(-1)
        shifts = (head.latent_scale * h @ head.shift.weight.T).unflatten(-1, (head.num_mixtures, -1))
        latents = h.unsqueeze(1) + shifts
        logits = logits_of(latents)
        if head.shortlist_size is not None:
            shared = logits_of(latents.mean(1))
            inside = torch.zeros_like(shared).scatter(1, shared.topk(head.shortlist_size).indices, 1).unsqueeze(1)
            logits = torch.where(inside > 0, logits, shared.unsqueeze(1))
            weights = torch.nn.functional.normalize(weights * logits.exp().sum(-1), p=1, dim=-1)
        components = logits.softmax(-1)
        mixture = (weights.unsqueeze(-1) * components).sum(1)
    return {
        "weights": weights,
        "components": components,
        "mixture": mixture,
        "softmax": logits_of(h).softmax(-1).detach(),
    }


def entropy(probs: torch.Tensor) -> torch.Tensor:
    return -(probs * probs.log()).sum(-1)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("gpt2", {}),
        ("gemma2", {}),
        ("mamba", {}),
        ("gemma2", {"shortlist_size": None}),
        ("llama", {"shortlist_size": None}),
        ("llama", {"shortlist_size": 5}),
        ("llama-tied", {"num_mixtures": 1}),
    ],
)
def test_each_token_is_what_the_formulas_say(backbone: str, options: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer, backbone, **options).double()
    with torch.no_grad():
        model.get_input_embeddings().weight[0].normal_()  # of zeros, all classes would be equally likely
    inspection = inspect_mixture(model, tokenizer, text=TEXT, top=4).text
    token_ids = tokenizer(TEXT).input_ids
    hand = predicted_by_hand(model, [tokenizer.eos_token_id, *token_ids])
    predictions = [*(token.prediction for token in inspection.tokens), inspection.next]
    assert [token.token_id for token in inspection.tokens] == token_ids
    assert len(predictions) == len(token_ids) + 1

    def same(given: Any, expected: torch.Tensor) -> None:
        torch.testing.assert_close(torch.tensor(given, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)

    for i, prediction in enumerate(predictions):
        weights, components, mixture, softmax = (
            hand[name][i] for name in ("weights", "components", "mixture", "softmax")
        )
        same(prediction.mixture_weights, weights)
        same(prediction.mixture_weights_entropy, entropy(weights))
        same(prediction.entropy, entropy(mixture))
        same(prediction.component_entropies, entropy(components))
        same(prediction.softmax_entropy, entropy(softmax))
        distributions = [mixture, softmax, *components]
        for candidates, probs in zip(
            [prediction.top, prediction.softmax_top, *prediction.component_top], distributions, strict=True
        ):
            values, ids = probs.topk(4)
            assert [candidate.token_id for candidate in candidates] == ids.tolist()
            same([candidate.probability for candidate in candidates], values)
        if i == len(token_ids):
            assert prediction.responsibilities is prediction.nll is prediction.softmax_nll is None
            assert prediction.component_nll is None
            continue
        target = token_ids[i]
        same(prediction.nll, -mixture[target].log())
        same(prediction.softmax_nll, -softmax[target].log())
        same(prediction.component_nll, -components[:, target].log())
        same(prediction.responsibilities, weights * components[:, target] / mixture[target])


def test_the_nll_is_the_models_own_loss() -> None:
    tokenizer = tokenizer_of(bos_token=END)
    model = mixture_for(tokenizer)
    tokens = inspect_mixture(model, tokenizer, text=TEXT).text.tokens
    input_ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT).input_ids]])
    with torch.no_grad():
        loss = model(input_ids, labels=input_ids).loss
    assert sum(token.prediction.nll for token in tokens) / len(tokens) == pytest.approx(float(loss), abs=1e-5)


def test_before_training_every_component_is_the_old_softmax() -> None:
    tokenizer = tokenizer_of(eos_token=END)
    softmax = tiny_causal_lm("gemma2", vocab_size=len(tokenizer))
    with torch.no_grad():
        logits = softmax(torch.tensor([[0, *tokenizer(TEXT).input_ids]])).logits[0]
    model = MoSForCausalLM.from_causal_lm(softmax, num_mixtures=3)
    inspection = inspect_mixture(model, tokenizer, text=TEXT, corpus=CORPUS)
    for token, log_probs in zip(inspection.text.tokens, logits.log_softmax(-1), strict=False):
        prediction = token.prediction
        assert prediction.softmax_nll == pytest.approx(-float(log_probs[token.token_id]), abs=1e-4)
        assert prediction.component_nll == pytest.approx([prediction.softmax_nll] * 3, abs=1e-4)
        assert prediction.responsibilities == pytest.approx(prediction.mixture_weights, abs=1e-4)
    corpus = inspection.corpus
    assert max(map(max, corpus.divergence)) < 1e-5
    assert corpus.nll == pytest.approx(corpus.softmax_nll, abs=1e-5)
    assert corpus.rank.mixture == corpus.rank.softmax


# ------------------------------------------------------------------------------------------- the numbers of a corpus


def test_a_corpus_is_what_the_formulas_say() -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer, "gpt2").double()
    corpus = inspect_mixture(model, tokenizer, corpus=[*CORPUS, ""], top=3).corpus
    rows = [tokenizer(text).input_ids for text in CORPUS]
    hands = [predicted_by_hand(model, [tokenizer.eos_token_id, *row]) for row in rows]
    hand = {name: torch.cat([hand[name][:-1] for hand in hands]) for name in hands[0]}
    targets = torch.tensor([token for row in rows for token in row])
    N, K = len(targets), 3
    everyone = torch.arange(N)
    components, mixture = hand["components"], hand["mixture"]
    responsibilities = hand["weights"] * components[everyone, :, targets] / mixture[everyone, targets].unsqueeze(-1)

    assert corpus.num_texts == len(CORPUS)
    assert corpus.num_tokens == N
    assert corpus.nll == pytest.approx(float(-mixture[everyone, targets].log().mean()))
    assert corpus.softmax_nll == pytest.approx(float(-hand["softmax"][everyone, targets].log().mean()))
    assert corpus.entropy == pytest.approx(float(entropy(mixture).mean()))
    assert corpus.mixture_weights_entropy == pytest.approx(float(entropy(hand["weights"]).mean()))
    leads = Counter(responsibilities.argmax(-1).tolist())
    counts = Counter(targets.tolist())
    for k, component in enumerate(corpus.components):
        assert component.mean_weight == pytest.approx(float(hand["weights"][:, k].mean()))
        assert component.responsibility == pytest.approx(float(responsibilities[:, k].mean()))
        assert component.leads == pytest.approx(leads[k] / N)
        assert component.entropy == pytest.approx(float(entropy(components[:, k]).mean()))
        excess = {
            token: float((responsibilities[targets == token, k] - component.responsibility).sum()) for token in counts
        }
        assert [share.token_id for share in component.tokens] == sorted(excess, key=excess.get, reverse=True)[:3]
        for share in component.tokens:
            assert share.count == counts[share.token_id]
            mean = responsibilities[targets == share.token_id, k].mean()
            assert share.responsibility == pytest.approx(float(mean))
    for j in range(K):
        for k in range(K):
            middle = (components[:, j] + components[:, k]) / 2
            kl = [(components[:, i] * (components[:, i] / middle).log()).sum(-1) for i in (j, k)]
            assert corpus.divergence[j][k] == pytest.approx(float((kl[0] + kl[1]).mean() / 2), abs=1e-12)


@pytest.mark.parametrize("stride", [None, 5, 16])
def test_a_text_beyond_the_window_is_evaluated_as_by_evaluate(stride: int | None) -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model, text = mixture_for(tokenizer), " ".join(CORPUS)
    sliding = {"window": 16, "stride": stride}
    expected = evaluate(model, tokenizer, [text], **sliding)
    inspection = inspect_mixture(model, tokenizer, text=text, corpus=[text], **sliding)
    tokens = inspection.text.tokens
    assert len(tokens) == inspection.corpus.num_tokens == expected.num_tokens > 100
    assert inspection.corpus.nll == pytest.approx(expected.nats_per_token, abs=1e-5)
    assert sum(token.prediction.nll for token in tokens) == pytest.approx(expected.nats, rel=1e-5)
    assert (inspection.corpus.window, inspection.corpus.stride) == (16, stride or 8)


def test_by_default_the_window_is_the_models() -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer, "gpt2")  # of 128 learned positions
    text = " ".join(CORPUS)
    inspection = inspect_mixture(model, tokenizer, text=text, corpus=[text])
    assert inspection.corpus.window == 128
    assert len(inspection.text.tokens) > 300


def test_the_rank_passes_the_bound_of_one_softmax() -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer).double()
    rank = inspect_mixture(model, tokenizer, corpus=CORPUS).corpus.rank
    hands = [predicted_by_hand(model, [tokenizer.eos_token_id, *tokenizer(text).input_ids]) for text in CORPUS]
    by_hand = {name: torch.cat([hand[name][:-1] for hand in hands]).log() for name in ("mixture", "softmax")}
    assert rank.softmax == rank.bound == 33 == torch.linalg.matrix_rank(by_hand["softmax"])
    assert rank.mixture == torch.linalg.matrix_rank(by_hand["mixture"]) > 200
    assert (rank.contexts, rank.classes) == by_hand["mixture"].shape
    torch.testing.assert_close(
        torch.tensor(rank.singular_values[:200], dtype=torch.float64),
        torch.linalg.svdvals(by_hand["mixture"])[:200],
        rtol=1e-6,
        atol=1e-9,
    )


def test_of_a_long_corpus_contexts_all_over_it_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_mos.tools.inspection.inspect_mixture.RANK_CLASSES", 80)
    tokenizer = tokenizer_of(eos_token=END)
    corpus = inspect_mixture(mixture_for(tokenizer), tokenizer, corpus=CORPUS, rank_contexts=120).corpus
    rank = corpus.rank
    every = math.ceil(corpus.num_tokens / 120)
    assert every > 1
    assert rank.contexts == math.ceil(corpus.num_tokens / every)
    assert rank.classes == 80
    assert rank.softmax == 33 < rank.mixture <= 80


def test_memory_holds_a_chunk_of_distributions_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer, num_mixtures=4)
    whole = inspect_mixture(model, tokenizer, corpus=CORPUS, rank_contexts=0).corpus
    assert whole.rank is None
    monkeypatch.setattr("hf_mos.remote_code.mos_decoder.CPU_BUDGET_BYTES", 100_000)  # 5 tokens of 4 components
    with LargestTensor() as largest:
        corpus = inspect_mixture(model, tokenizer, corpus=CORPUS, rank_contexts=40).corpus
    assert largest.numel <= 40 * len(tokenizer)
    assert largest.numel < corpus.num_tokens * len(tokenizer) / 10
    assert corpus.nll == pytest.approx(whole.nll, abs=1e-5)
    assert corpus.components[0].responsibility == pytest.approx(whole.components[0].responsibility, abs=1e-5)
    assert torch.allclose(torch.tensor(corpus.divergence), torch.tensor(whole.divergence), atol=1e-5)


def test_max_tokens_are_the_first_of_the_corpus() -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer)
    first = tokenizer(CORPUS[0]).input_ids
    corpus = inspect_mixture(model, tokenizer, corpus=CORPUS, max_tokens=len(first) + 2).corpus
    assert (corpus.num_tokens, corpus.num_texts) == (len(first) + 2, 2)
    assert inspect_mixture(model, tokenizer, corpus=CORPUS, max_tokens=len(first)).corpus == (
        inspect_mixture(model, tokenizer, corpus=CORPUS[:1]).corpus
    )


# ----------------------------------------------------------------------------------------------- tokens and tokenizers


def without_bytes(text: str) -> str:
    """Without the bytes that stand before a character of several tokens."""
    return re.sub(r"\\x[0-9a-f]{2}", "", text)


@pytest.mark.parametrize("kind", ["byte-level", "sentence-piece"])
def test_texts_of_tokens_are_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    texts = TokenTexts(tokenizer).of_text(tokenizer(TEXT).input_ids)
    assert without_bytes("".join(texts)).removeprefix(" ") == TEXT
    face = texts.index("😀")
    assert texts[face - 3 : face] == ["\\xf0", "\\x9f", "\\x98"]


@pytest.mark.parametrize(("kind", "mark"), [("byte-level", "Ġ"), ("sentence-piece", "▁"), ("word-piece", "")])
def test_words_keep_their_spaces(kind: str, mark: str) -> None:
    tokenizer = tokenizer_of(kind)
    texts = TokenTexts(tokenizer)
    words = {token: id for token, id in tokenizer.get_vocab().items() if token.removeprefix(mark).isalpha()}
    assert len(words) > 20
    for token, id in words.items():
        expected = f" {token.removeprefix(mark)}" if token.startswith(mark) else token
        assert texts(id) == expected or not token.isascii()


@pytest.mark.parametrize("text", ["日本語テキスト", "é", "\ufffd", "a\ufffdb", "👩‍👩‍👧", "\x00\x07", "שלום"])
def test_any_text_has_texts(text: str) -> None:
    tokenizer = tokenizer_of()
    token_ids = tokenizer(text).input_ids
    texts = TokenTexts(tokenizer).of_text(token_ids)
    assert len(texts) == len(token_ids)
    assert all(texts)
    if "\ufffd" not in text:
        assert without_bytes("".join(texts)) == text
    assert all(c.isprintable() or c == "\n" for t in texts for c in running(t) + visible(t))


def test_a_class_without_a_token_has_a_name() -> None:
    tokenizer = tokenizer_of()
    assert TokenTexts(tokenizer)(len(tokenizer) + 3) == f"[{len(tokenizer) + 3}]"


def test_without_a_prefix_the_first_token_is_not_predicted() -> None:
    tokenizer = tokenizer_of()
    model = mixture_for(tokenizer)
    inspection = inspect_mixture(model, tokenizer, text="The cat", corpus=CORPUS)
    first, *others = inspection.text.tokens
    assert first.prediction is None
    assert all(token.prediction is not None for token in others)
    assert inspection.text.prefix_token_id is None
    assert inspection.corpus.num_tokens == sum(len(tokenizer(text).input_ids) - 1 for text in CORPUS)
    assert "Token by token" in printed(inspection)
    assert render_page(inspection).count('class="mos-token"') == len(inspection.text.tokens) + 1


@pytest.mark.parametrize("special", [{}, {"bos_token": END}])
def test_a_text_of_one_token(special: dict[str, str]) -> None:
    tokenizer = tokenizer_of(**special)
    inspection = inspect_mixture(mixture_for(tokenizer), tokenizer, text="T")
    assert [token.text for token in inspection.text.tokens] == ["T"]
    assert (inspection.text.tokens[0].prediction is None) == (not special)
    assert len(inspection.text.next.top) == 5
    render_page(inspection)
    printed(inspection)


def test_a_vocabulary_smaller_than_the_top() -> None:
    tokenizer = tokenizer_of()
    inspection = inspect_mixture(mixture_for(tokenizer), tokenizer, text="The", corpus=CORPUS, top=10_000)
    assert len(inspection.text.next.top) == len(tokenizer)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected a text or a corpus, given neither"),
        ({"text": ""}, "text: expected at least one token, given ''"),
        ({"corpus": ["", ""]}, "corpus: expected some text"),
        ({"corpus": []}, "corpus: expected some text"),
        ({"text": "x", "top": 0}, "top: expected at least 1"),
        ({"text": "x", "max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"text": "x", "rank_contexts": -1}, "rank_contexts: expected at least 0"),
        ({"text": "x", "window": 1000}, "window: expected at least 1 and at most the model's 128 positions"),
        ({"text": "x", "window": 8, "stride": 9}, "stride: expected at least 1"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(options: dict[str, Any], message: str) -> None:
    tokenizer = tokenizer_of(eos_token=END)
    with pytest.raises(ValueError, match=message):
        inspect_mixture(mixture_for(tokenizer), tokenizer, **options)


def test_a_softmax_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a mixture of softmaxes, given LlamaForCausalLM; hf-mos convert"):
        inspect_mixture(tiny_causal_lm(), tokenizer_of(), text="x")


def test_a_model_in_training_mode_is_refused() -> None:
    tokenizer = tokenizer_of()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        inspect_mixture(mixture_for(tokenizer).train(), tokenizer, text="x")


def test_another_models_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="is it the model's own"):
        inspect_mixture(tiny_mos(), tokenizer_of(), text=TEXT)  # of a vocabulary of 97


@pytest.mark.parametrize("what", [{"text": "The cat"}, {"corpus": ["The cat"]}])
def test_predictions_that_are_not_finite_are_an_error(what: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer)
    model.lm_head.prior.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="given NaN"):
        inspect_mixture(model, tokenizer, **what)


def test_a_class_without_probability_leaves_the_rank_out() -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[5] = -math.inf
    inspection = inspect_mixture(model, tokenizer, text="The cat", corpus=["The cat sat"])
    assert inspection.corpus.rank is None
    assert math.isfinite(inspection.corpus.nll)
    render_page(inspection)
    printed(inspection)


# -------------------------------------------------------------------------------------------------------- JSON, tables


def whole_inspection(**options: Any) -> Inspection:
    tokenizer = tokenizer_of(eos_token=END)
    return inspect_mixture(mixture_for(tokenizer, **options), tokenizer, text=TEXT, corpus=CORPUS)


@pytest.mark.parametrize("options", [{}, {"num_mixtures": 1}, {"shortlist_size": None}])
def test_the_json_is_the_inspection(options: dict[str, Any]) -> None:
    inspection = whole_inspection(**options)
    text = inspection.to_json()
    assert TypeAdapter(Inspection).validate_json(text, strict=True) == inspection
    content = json.loads(text)
    assert content["text"]["text"] == TEXT
    assert set(content) == {"model", "text", "corpus"}
    assert content["model"] == {
        "name": "",
        "backbone": "LlamaForCausalLM",
        "num_mixtures": options.get("num_mixtures", 3),
        "shortlist_size": options.get("shortlist_size", 64),
        "hidden_size": 32,
        "vocab_size": len(tokenizer_of()),
        "softcap": None,
    }


def printed(inspection: Inspection, width: int = 160) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables(inspection))
    console.file.close()
    return console.export_text()


def test_the_tables_say_it() -> None:
    inspection = whole_inspection()
    text = printed(inspection)
    assert "café" not in text  # tokens, not the text
    lines = text[text.index("Token by token") :].splitlines()[4:]
    for token, line in zip(inspection.text.tokens, lines, strict=False):  # one line each
        assert line.strip().startswith(visible(token.text))
        assert f"{token.prediction.nll:.2f}" in line
        assert f"{token.prediction.softmax_nll:.2f}" in line
        weights = " ".join(f"{100 * weight:2.0f}" for weight in token.prediction.mixture_weights)
        leader = max(range(3), key=token.prediction.responsibilities.__getitem__)
        assert f"{weights} " in line
        assert f"{leader}: {100 * token.prediction.responsibilities[leader]:.0f} %" in line
        assert f"{visible(token.prediction.top[0].text)} {100 * token.prediction.top[0].probability:.0f}" in line
    assert "next token" in lines[len(inspection.text.tokens)]
    for k, component in enumerate(inspection.corpus.components):
        assert f"component {k}" in text
        assert f"{100 * component.mean_weight:.1f} %" in text
    assert f"{inspection.corpus.nll:.4f}" in text
    assert "bound of one softmax" in text
    assert "✓" in text
    narrow = printed(inspection, width=60)
    assert narrow.splitlines()[4 + len(inspection.text.tokens)].strip().startswith("next")  # no line is wrapped


def test_the_tables_of_the_default_mixture_fit_a_terminal() -> None:
    inspection = whole_inspection(num_mixtures=16)
    text = printed(inspection, width=80)
    assert "weight, %" in text
    divergence = text[text.index("Jensen-Shannon") : text.index("The mixture and the old softmax")]
    assert "…" not in divergence  # no number is cut
    pairs = [row[k] for j, row in enumerate(inspection.corpus.divergence) for k in range(j)]
    for value in (sum(pairs) / len(pairs), min(pairs), max(pairs)):
        assert f"{value:.4f}" in divergence


# ------------------------------------------------------------------------------------------------------------ the page


class Page(HTMLParser):
    """The elements of a page, their text and what they load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.inks: list[str] = []  # what of a token has its colour
        self.data = ""
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.tags: Counter[str] = Counter()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        attributes = dict(attributes)
        self.tags[tag] += 1
        self.open.append((tag, attributes))
        if attributes.get("class") == "mos-token":
            self.tokens.append("")
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loaded += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if any(attributes.get("class") == "mos-token" for _, attributes in self.open):
            self.tokens[-1] += data
        if self.open and self.open[-1][1].get("class") == "mos-ink":
            self.inks.append(data)
        if self.open and self.open[-1][1].get("class") == "mos-data":
            self.data += data


HOSTILE = "</div></script><script>alert(1)</script><img src=x onerror=alert(2)> &amp; {{ 7 * 7 }} ${1} \u202e\x00\n x"


def test_the_page_needs_nothing_else_and_escapes_the_text() -> None:
    tokenizer = tokenizer_of(eos_token=END)
    inspection = inspect_mixture(mixture_for(tokenizer), tokenizer, text=HOSTILE, corpus=[HOSTILE, *CORPUS])
    html = render_page(inspection)
    page = Page(html)
    assert without_bytes("".join(page.tokens).removesuffix("▸")) == without_bytes(running(HOSTILE))
    assert page.tags["script"] == 1
    assert page.tags["img"] == 0
    assert page.tags["svg"] == 4  # the text, usage, divergence, singular values
    assert all(target.startswith(("#", "data:")) for target in page.loaded)
    assert "@import" not in html
    assert "url(http" not in html
    assert len(page.ids) == len(set(page.ids))
    tokens = json.loads(page.data)["tokens"]
    assert len(tokens) == len(page.tokens)
    assert tokens[3]["prediction"]["nll"] == pytest.approx(inspection.text.tokens[3].prediction.nll, rel=1e-4)


def test_the_colour_of_a_token_leaves_the_space_before_it_out() -> None:
    """That space hangs at the end of the line before."""
    tokenizer = tokenizer_of(eos_token=END)
    text = "In 2017 the cat  sat."
    page = Page(render_page(inspect_mixture(mixture_for(tokenizer), tokenizer, text=text)))
    assert "".join(page.tokens).removesuffix("▸") == text
    assert len(page.inks) == len(page.tokens)
    assert all(ink == token.lstrip(" ") or ink == token for ink, token in zip(page.inks, page.tokens, strict=True))
    assert not any(ink.startswith(" ") and ink.strip() for ink in page.inks)


def test_the_page_says_that_the_old_softmax_is_no_trained_one() -> None:
    inspection = whole_inspection()
    assert "Training after the conversion optimizes the mixture, not the old softmax" in render_page(inspection)
    assert "Training after the conversion optimizes the mixture, not the old softmax" in " ".join(
        printed(inspection).split()
    )


@pytest.mark.parametrize("options", [{"num_mixtures": 1}, {"num_mixtures": 16}])
def test_a_page_for_any_number_of_components(options: dict[str, Any]) -> None:
    inspection = whole_inspection(**options)
    page = Page(render_page(inspection))
    assert page.tags["svg"] == (3 if options["num_mixtures"] == 1 else 4)
    printed(inspection)
    styles = {tuple(component.values()) for component in json.loads(page.data)["components"]}
    assert len(styles) == options["num_mixtures"]  # no two are marked alike


def test_of_many_components_the_most_used_have_colours_and_the_others_are_one() -> None:
    inspection = whole_inspection(num_mixtures=16)
    html = render_page(inspection)
    page = Page(html)
    usage = [component.mean_weight for component in inspection.corpus.components]
    most = {str(k) for k in sorted(range(16), key=usage.__getitem__)[-5:]}
    content = json.loads(page.data)
    colors = {component["label"]: component["color"] for component in content["components"]}
    assert len({colors[label] for label in most} | {content["others"]["color"]}) == 6
    assert all((colors[label] == content["others"]["color"]) == (label not in most) for label in colors)

    keys = re.findall(r'class="mos-key"><span [^>]*>(\w+)</span>(\d+) %', html)
    assert {label for label, _ in keys} == most | {"others"}
    predictions = [*(token.prediction for token in inspection.text.tokens), inspection.text.next]
    shares = {label: sum(p.mixture_weights[int(label)] for p in predictions) / len(predictions) for label in most}
    assert dict(keys) == {
        label: f"{100 * share:.0f}" for label, share in (shares | {"others": 1 - sum(shares.values())}).items()
    }
    assert "the 11 others" in " ".join(html.split())
    assert "others are grey" not in " ".join(render_page(whole_inspection(num_mixtures=6)).split())


def test_a_number_above_a_token_is_no_longer_than_the_token() -> None:
    """Else the numbers of two digits of neighbours run together."""
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer, num_mixtures=16)
    model.lm_head.prior.weight.data[10:] *= 30
    inspection = inspect_mixture(model, tokenizer, text=TEXT + " x y z 1 2 3 4 5")
    spans = re.findall(
        r'data-label="(\d*)" style="[^"]*">( *)<span class="mos-ink" data-label="(\d*)">([^<]*)<',
        render_page(inspection),
    )
    assert len(spans) == len(inspection.text.tokens) + 1
    assert any(len(label) == 2 and not drawn for label, _, drawn, _ in spans)
    for label, _, drawn, ink in spans:
        assert drawn == (label if len(label) <= len(unescape(ink).removesuffix("\n")) else "")


def test_the_page_shows_no_marks_of_another_language() -> None:
    inspection = whole_inspection()
    assert "`" not in re.sub(
        r"<script>.*?</script>|<div class=.mos-data.*?</div>", "", render_page(inspection), flags=re.DOTALL
    )
    assert "`" not in printed(inspection)


@needs_chromium
@pytest.mark.parametrize("width", [1200, 480])
def test_in_a_browser_a_table_that_is_cut_says_so(tmp_path: Path, width: int) -> None:
    save_page(whole_inspection(num_mixtures=16), tmp_path / "page.html")
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    )  # a window has a least width
    with browser(1300, 1000) as chrome:
        chrome.get(f"file://{tmp_path}/frame.html")
        chrome.switch_to.frame(0)
        places = chrome.find_elements(By.CSS_SELECTOR, ".mos-scroll")
        assert len(places) == 4  # the weights and the candidates of a token, the plot, the components
        cut = [int(place.get_property("scrollWidth")) > int(place.get_property("clientWidth")) + 1 for place in places]
        script = "return getComputedStyle(arguments[0], '::before').content"
        assert ["scroll sideways" in chrome.execute_script(script, place) for place in places] == cut
        assert any(cut) or width > 480
        body = chrome.find_element(By.TAG_NAME, "body")
        assert int(body.get_property("scrollWidth")) <= width  # the page itself is not wider than its place
        assert "not the other 11" in chrome.find_element(By.CSS_SELECTOR, ".mos-detail").text
        rows = chrome.find_elements(By.CSS_SELECTOR, ".mos-detail table:first-of-type tbody tr .mos-swatch")
        assert [row.text for row in rows][5] == "others"


def test_a_page_takes_the_place_of_another_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.html"
    file.write_text("old")
    inspection = whole_inspection()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            save_page(inspection, file)
    assert file.read_text() == "old"
    save_page(inspection, file)
    assert file.read_text(encoding="utf-8") == render_page(inspection)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@needs_chromium
def test_in_a_browser_the_page_shows_the_details_of_a_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer)
    inspection = inspect_mixture(model, tokenizer, text=HOSTILE + TEXT, corpus=CORPUS)
    save_page(inspection, tmp_path / "page.html")
    with browser(1200, 1000) as chrome:
        chrome.get(f"file://{tmp_path}/page.html")
        tokens = chrome.find_elements(By.CSS_SELECTOR, ".mos-token")
        detail = chrome.find_element(By.CSS_SELECTOR, ".mos-detail")
        assert len(tokens) == len(inspection.text.tokens) + 1
        assert "old softmax" in detail.text  # of the token that is shown at first

        index = 7
        tokens[index].click()
        prediction = inspection.text.tokens[index].prediction
        assert f"token {inspection.text.tokens[index].token_id}" in detail.text
        assert f"{prediction.nll:.2f} nats" in detail.text
        shown = [cell.text for cell in detail.find_elements(By.CSS_SELECTOR, ".mos-candidate bdi")]
        columns = [prediction.top, prediction.softmax_top, *prediction.component_top]
        assert shown == [visible(column[i].text) for i in range(5) for column in columns]

        chrome.find_element(By.CSS_SELECTOR, ".mos-tokens").send_keys(Keys.ARROW_RIGHT)
        assert f"token {inspection.text.tokens[index + 1].token_id}" in detail.text
        tokens[-1].click()
        assert "What comes next" in detail.text

        ink = tokens[index].find_element(By.CSS_SELECTOR, ".mos-ink")
        before = ink.value_of_css_property("background-color")
        scale = chrome.find_element(By.CSS_SELECTOR, ".mos-scale")
        for option, label in (("surprise", f"{prediction.nll:.2f}"), ("weight", None), ("gain", None)):
            scale.find_element(By.CSS_SELECTOR, f"[value={option}]").click()
            assert label in (None, tokens[index].get_attribute("data-label"))
        assert tokens[index].get_attribute("data-label")[0] in "+\u2212"
        scale.find_element(By.CSS_SELECTOR, "[value=responsibility]").click()
        assert ink.value_of_css_property("background-color") == before
        assert before != "rgba(0, 0, 0, 0)"
        assert complaints(chrome) == []
        assert {address.partition(":")[0] for address in requested(chrome)} <= {"file", "data"}


@needs_chromium
def test_the_page_is_dark_where_the_reader_wants_it_dark(tmp_path: Path) -> None:
    save_page(whole_inspection(), tmp_path / "page.html")
    looks = []
    for options in ([], ["--blink-settings=preferredColorScheme=0"]):
        with browser(1200, 1000, *options) as chrome:
            chrome.get(f"file://{tmp_path}/page.html")
            body = chrome.find_element(By.TAG_NAME, "body")
            axis = chrome.find_element(By.CSS_SELECTOR, "svg text")
            looks.append((body.value_of_css_property("background-color"), axis.value_of_css_property("fill")))
            assert body.value_of_css_property("color") == axis.value_of_css_property("fill").replace(
                "rgb", "rgba"
            ).replace(")", ", 1)")
    (light, ink), (dark, chalk) = looks
    assert light == "rgba(255, 255, 255, 1)"
    assert dark != light
    assert ink != chalk


# ---------------------------------------------------------------------------------------------------- the command line


def test_the_command_prints_the_json_of_the_inspection(mixture: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--text", "Sentence 3 says", "--validation-file", text_file, "--max-tokens", 300, "--top", 2, "--json"]
    process = run_command("inspect", mixture, *options, "--html", tmp_path / "page.html", cache=tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(mixture), AutoTokenizer.from_pretrained(mixture)
    expected = inspect_mixture(
        model.eval(), tokenizer, text="Sentence 3 says", corpus=[text_file.read_text()], top=2, max_tokens=300
    )
    given = TypeAdapter(Inspection).validate_json(process.stdout)
    assert given.model == expected.model
    assert [token.text for token in given.text.tokens] == [token.text for token in expected.text.tokens]
    assert given.corpus.nll == pytest.approx(expected.corpus.nll, abs=1e-5)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "".join(page.tokens) == "Sentence 3 says▸"


def test_the_command_prints_tables(mixture: Path, text_file: Path, tmp_path: Path) -> None:
    process = run_command("inspect", mixture, "--text", "Sentence", "--validation-file", text_file, cache=tmp_path)
    for words in ("Token by token", "next token", "Components over", "Jensen-Shannon", "bound of one softmax"):
        assert words in process.stdout
    assert not re.search("Failed to load|Enum subclass", process.stderr)  # torchao's, which transformers imports


def test_a_page_of_a_file_shows_its_beginning(mixture: Path, text_file: Path, tmp_path: Path) -> None:
    process = run_command("inspect", mixture, "--validation-file", text_file, "--html", "page.html", cache=tmp_path)
    assert "page.html" in process.stdout
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "".join(page.tokens).removesuffix("▸") == running(text_file.read_text()[:1000])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "expected --text or --validation-file, given neither"),
        (["--text", ""], 1, "text: expected at least one token"),
        (["--validation-file", "missing.txt"], 2, "missing.txt"),
        (["--text", "x", "--html", "no/folder/page.html"], 2, "html: expected a file in a folder that is there"),
    ],
)
def test_the_command_says_what_is_wrong(
    mixture: Path, options: list[str], code: int, message: str, tmp_path: Path
) -> None:
    process = run_command("inspect", mixture, *options, cache=tmp_path, code=code)
    assert message in " ".join(process.stderr.replace("│", " ").split())
    assert "Traceback" not in process.stderr


def test_the_command_refuses_a_softmax(base: Path, tmp_path: Path) -> None:
    process = run_command("inspect", base, "--text", "x", cache=tmp_path, code=2)
    assert f"expected a mixture of softmaxes, given {base}" in process.stderr


def test_the_code_beside_a_checkpoint_is_looked_at_as_our_own(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(eos_token=END)
    model = mixture_for(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = """
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
remote = get_class_from_dynamic_module("modeling_mos.MoSForCausalLM", sys.argv[1])
model = remote.from_pretrained(sys.argv[1]).eval()
assert not type(model.lm_head).__module__.startswith("hf_mos"), type(model.lm_head)
from hf_mos.tools.inspection.inspect_mixture import inspect_mixture
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(inspect_mixture(model, tokenizer, text=sys.argv[2], corpus=[sys.argv[3]]).to_json())
"""
    output = run_python(code, tmp_path / "model", TEXT, CORPUS[0], cache=tmp_path, without_hf_mos=False)
    given = TypeAdapter(Inspection).validate_json(output)
    expected = inspect_mixture(model, tokenizer, text=TEXT, corpus=CORPUS[:1])
    assert given.text.next.mixture_weights == pytest.approx(expected.text.next.mixture_weights, abs=1e-5)
    assert given.corpus.nll == pytest.approx(expected.corpus.nll, abs=1e-5)
    assert given.corpus.rank.mixture == expected.corpus.rank.mixture
