"""Inspects a mixture: token by token on a text, and on average over a corpus.

```python
inspection = inspect_mixture(model, tokenizer, text="The cat sat.", corpus=[Path("book.txt").read_text()])
print(inspection.to_json())
```

The old softmax is the decoder applied to the hidden state itself, with its bias and softcap. Before
training this is the model that was converted; afterwards it is one softmax with the same decoder and hidden state.
Logarithms are natural: every nll, entropy and divergence is in nats.
"""

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...remote_code.mos_decoder import cap_logits, upcast
from ...training.mixture_statistics import Predictions, StatisticsSum, entropy, predict_in_chunks
from ..chat import Text
from ..evaluate import Window, check_tokens, choose_window, prefix_of, sequence_of, windows_of
from ..loading import is_mixture
from ..rank import log_prob_rank
from .token_texts import TokenTexts

UNKNOWN_TARGET = -1  # at the position after the end of a text
RANK_CLASSES = 4096
# Where the two are compared: a lower nll than the old softmax's reads as a gain.
OLD_SOFTMAX = (
    "The old softmax applies the decoder to the hidden state itself. Training after the conversion optimizes the "
    "mixture, not the old softmax. So a lower nll of the mixture proves no gain: compare with a softmax model that "
    "was trained for as long (hf-mos train --head softmax)."
)


# --------------------------------------------------------------------------------------------------------- the results


@dataclass(frozen=True)
class Candidate:
    """A token that may come next."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The prediction at one position. Lists over the components have K entries; `None`: no token follows."""

    mixture_weights: list[float]
    responsibilities: list[float] | None
    nll: float | None
    component_nll: list[float] | None
    softmax_nll: float | None
    mixture_weights_entropy: float
    entropy: float  # of the next token
    component_entropies: list[float]
    softmax_entropy: float
    top: list[Candidate]  # of the mixture, the most likely first
    component_top: list[list[Candidate]]
    softmax_top: list[Candidate]


@dataclass(frozen=True)
class Token:
    """A token of the text, and its prediction from the tokens before it."""

    token_id: int
    token: str  # as the vocabulary spells it
    text: str  # readable; bytes of an incomplete character as hexadecimal escapes
    prediction: Prediction | None  # None for the first token without a prefix


@dataclass(frozen=True)
class TextInspection:
    """A text, token by token."""

    text: str
    prefix_token_id: int | None  # read before the text
    tokens: list[Token]
    next: Prediction  # the prediction after the end of the text


@dataclass(frozen=True)
class TokenShare:
    """A token of the corpus, and the share of its occurrences that a component accounts for."""

    token_id: int
    text: str
    count: int
    responsibility: float


@dataclass(frozen=True)
class ComponentInspection:
    """One component over the corpus."""

    mean_weight: float  # its usage
    responsibility: float  # the share of the tokens that it accounts for
    leads: float  # the share of the tokens for which its responsibility is the largest
    entropy: float  # of its next token, the mean
    tokens: list[TokenShare]  # tokens for which it is more responsible than on average, the largest sum first


@dataclass(frozen=True)
class RankInspection:
    """The numerical rank of a log-probability matrix of contexts and classes, in float64."""

    contexts: int
    classes: int  # columns, spread over the vocabulary; fewer than all give a lower bound
    bound: int  # hidden_size + 1, the bound of one softmax without a softcap
    mixture: int
    softmax: int
    singular_values: list[float]  # of the mixture's, largest first
    softmax_singular_values: list[float]


@dataclass(frozen=True)
class CorpusInspection:
    """A mixture on average over a corpus."""

    num_texts: int
    num_tokens: int  # that were predicted
    window: int
    stride: int
    nll: float  # per token
    softmax_nll: float
    mixture_weights_entropy: float
    entropy: float
    components: list[ComponentInspection]
    divergence: list[list[float]]  # K x K, Jensen-Shannon
    rank: RankInspection | None  # None: not requested, a quantized or offloaded head, or a class with zero probability


@dataclass(frozen=True)
class ModelInspection:
    """The inspected mixture."""

    name: str
    backbone: str
    num_mixtures: int
    shortlist_size: int | None
    hidden_size: int
    vocab_size: int
    softcap: float | None


@dataclass(frozen=True)
class Inspection:
    """The result of [`inspect_mixture`]."""

    model: ModelInspection
    text: TextInspection | None
    corpus: CorpusInspection | None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False)


# ------------------------------------------------------------------------------------------------------------ the work


Track = Callable[[Sequence[Window]], Iterable[Window]]


def inspect_mixture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: Text | None = None,
    corpus: Sequence[Text] | None = None,
    top: int = 5,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    rank_contexts: int = 2048,
    track: Track = iter,
) -> Inspection:
    """Inspects a mixture on a text token by token, on a corpus on average, or both.

    A text begins after the tokenizer's token for a text's beginning, else its end; where it has neither, its first
    token is not predicted. A text that is longer than the window is read in windows, as by [`evaluate`]. Memory holds
    the component distributions of one chunk of tokens at a time, whatever the length of the corpus.

    Args:
        model: a mixture of softmaxes in evaluation mode, of the installed hf_mos or of the code beside a checkpoint.
        tokenizer: the model's own.
        text: looked at token by token, a [`Chat`] too.
        corpus: texts, looked at on average, [`Chat`]s too.
        top: how many candidates and tokens are listed.
        window: tokens that the model reads at a time. `None`: its positions, at most 2048.
        stride: how far the window slides, in [1, window]. `None`: half of the window.
        max_tokens: of the corpus, the first. `None`: all.
        rank_contexts: how many contexts all over the corpus make the log-probability matrix whose rank is measured,
            at most. Choose it above `hidden_size + 1`. It costs as many tokens of the head in float64. 0: no rank.
        track: takes the list of the corpus's windows and yields them, to show progress.

    Raises:
        ValueError: the model is no mixture, there is no text, or an option is out of range.
        FloatingPointError: a prediction is not finite.
    """
    check_mixture(model)
    if text is None and corpus is None:
        raise ValueError("expected a text or a corpus, given neither")
    if top < 1:
        raise ValueError(f"top: expected at least 1, given {top}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, given {max_tokens}")
    if rank_contexts < 0:
        raise ValueError(f"rank_contexts: expected at least 0, given {rank_contexts}")
    inspector = Inspector(model, tokenizer, top, *choose_window(model.config, window, stride))
    return Inspection(
        model=describe(model),
        text=None if text is None else inspector.inspect_text(text),
        corpus=None if corpus is None else inspector.inspect_corpus(corpus, max_tokens, rank_contexts, track),
    )


def check_mixture(model: PreTrainedModel) -> None:
    """Raises a ValueError for a model that is no mixture in evaluation mode."""
    refuse_softmax(model.config, type(model).__name__)
    if model.training:
        raise ValueError("model: expected one in evaluation mode, given one in training mode; call model.eval()")


def refuse_softmax(config: PreTrainedConfig, given: str) -> None:
    """Raises a ValueError for the config of a model that is no mixture."""
    if not is_mixture(config):
        raise ValueError(f"model: expected a mixture of softmaxes, given {given}; hf-mos convert makes one of it")


def describe(model: Any) -> ModelInspection:
    head = model.mos_head
    return ModelInspection(
        name=str(model.name_or_path or model.config.name_or_path),
        backbone=model.backbone_class.__name__,
        num_mixtures=head.num_mixtures,
        shortlist_size=head.shortlist_size,
        hidden_size=head.in_features,
        vocab_size=head.out_features,
        softcap=head.softcap,
    )


class Chunk(NamedTuple):
    """Consecutive tokens, and their predictions."""

    targets: Tensor  # (n,), UNKNOWN_TARGET where a text has ended
    hidden_states: Tensor  # (n, D)
    mixture: Predictions
    log_probs: Tensor  # (n, V)
    softmax_log_probs: Tensor  # (n, V)


class Inspector:
    """A model, its tokenizer, and the settings of the inspection."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, top: int, window: int, stride: int) -> None:
        self.model, self.tokenizer, self.texts = model, tokenizer, TokenTexts(tokenizer)
        self.head, self.decoder = model.mos_head, model.get_output_embeddings()
        self.top = min(top, self.head.out_features)
        self.window, self.stride = window, stride
        self.prefix = prefix_of(tokenizer)

    def windows_of(self, sequence: list[int]) -> list[Window]:
        """The windows of a text behind its prefix; each token that can be predicted is predicted once."""
        return list(windows_of(sequence, [True] * len(sequence), self.window, self.stride))

    def window_after(self, sequence: list[int]) -> Window:
        """The window that predicts the token after a text."""
        return Window(torch.tensor(sequence[-self.window :]), torch.tensor([UNKNOWN_TARGET]))

    @torch.inference_mode()
    def chunks(self, window: Window) -> Iterator[Chunk]:
        input_ids = window.inputs[None].to(self.model.device, torch.long)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        hidden_states = self.model.head_inputs(**inputs)[0, -len(window.targets) :]
        targets = window.targets.to(hidden_states.device, torch.long)
        for tokens, mixture in predict_in_chunks(self.head, hidden_states, self.decoder):
            log_probs = mixture.log_probs()
            if not log_probs.amax(-1).isfinite().all():  # amax passes NaN on; a class may have zero probability
                raise FloatingPointError(
                    f"expected finite predictions, given NaN; weights of dtype {self.model.dtype}"
                )
            softmax = softmax_log_probs(self.head, hidden_states[tokens], self.decoder)
            yield Chunk(targets[tokens], hidden_states[tokens], mixture, log_probs, softmax)

    def inspect_text(self, text: Text) -> TextInspection:
        sequence, counts = sequence_of(self.tokenizer, text, self.prefix)
        prefix = sequence[: len(sequence) - sum(counts)]
        token_ids = sequence[len(prefix) :]
        if not token_ids:
            raise ValueError(f"text: expected at least one token, given {text!r}, of which the tokenizer makes none")
        windows = [*self.windows_of(sequence), self.window_after(sequence)]
        check_tokens(self.model, windows)
        predictions = [p for window in windows for chunk in self.chunks(window) for p in self.predictions(chunk)]
        following = predictions.pop()
        unpredicted = [None] * (len(token_ids) - len(predictions))  # the first token, without tokens before it
        names = self.tokenizer.convert_ids_to_tokens(token_ids)
        texts = self.texts.of_text(token_ids)
        tokens = [Token(*fields) for fields in zip(token_ids, names, texts, [*unpredicted, *predictions], strict=True)]
        written = text if isinstance(text, str) else text.text
        return TextInspection(written, prefix[0] if prefix else None, tokens, following)

    def predictions(self, chunk: Chunk) -> Iterator[Prediction]:
        log_weights = chunk.mixture.log_weights
        component_nll = chunk.mixture.component_nll(chunk.targets.clamp(min=0))
        log_joint = log_weights - component_nll
        softmax = chunk.softmax_log_probs
        columns = {
            "mixture_weights": log_weights.exp(),
            "responsibilities": F.softmax(log_joint, dim=-1),
            "nll": -torch.logsumexp(log_joint, dim=-1),
            "component_nll": component_nll,
            "softmax_nll": -_gather(softmax, chunk.targets.clamp(min=0)),
            "mixture_weights_entropy": entropy(log_weights),
            "entropy": entropy(chunk.log_probs),
            "component_entropies": chunk.mixture.component_entropies(),
            "softmax_entropy": entropy(softmax),
        }
        rows = {name: values.tolist() for name, values in columns.items()}
        candidates, softmax_candidates = (self.candidates(*part.topk(self.top)) for part in (chunk.log_probs, softmax))
        component_candidates = self.candidates(*chunk.mixture.top(self.top))
        for i, target in enumerate(chunk.targets.tolist()):
            fields: dict[str, Any] = {name: values[i] for name, values in rows.items()}
            if target == UNKNOWN_TARGET:
                fields |= dict.fromkeys(("responsibilities", "nll", "component_nll", "softmax_nll"))
            yield Prediction(
                **fields,
                top=candidates[i],
                component_top=component_candidates[i],
                softmax_top=softmax_candidates[i],
            )

    def candidates(self, log_probs: Tensor, classes: Tensor) -> list[Any]:
        """The likeliest tokens of distributions (..., top): lists of [`Candidate`], nested as the leading sizes."""

        def name(ids: list[Any], probs: list[Any]) -> list[Any]:
            if isinstance(ids[0], list):
                return [name(*pair) for pair in zip(ids, probs, strict=True)]
            return [Candidate(id, self.texts(id), prob) for id, prob in zip(ids, probs, strict=True)]

        return name(classes.tolist(), log_probs.exp().tolist())

    def inspect_corpus(
        self, corpus: Sequence[Text], max_tokens: int | None, rank_contexts: int, track: Track
    ) -> CorpusInspection:
        windows, num_texts = self.corpus_windows(corpus, max_tokens)
        num_tokens = sum(len(window.targets) for window in windows)
        if not num_tokens:
            raise ValueError(
                "corpus: expected some text, given texts of which the tokenizer makes no token that can be predicted"
            )
        check_tokens(self.model, windows)
        total = CorpusSum(self.head, sample_every=-(-num_tokens // rank_contexts) if rank_contexts else None)
        for window in track(windows):
            for chunk in self.chunks(window):
                total.add(chunk)
        statistics = total.statistics.result()
        return CorpusInspection(
            num_texts=num_texts,
            num_tokens=num_tokens,
            window=self.window,
            stride=self.stride,
            nll=total.nll / num_tokens,
            softmax_nll=total.softmax_nll / num_tokens,
            mixture_weights_entropy=statistics.entropy,
            entropy=total.entropy / num_tokens,
            components=[
                ComponentInspection(
                    mean_weight=float(statistics.mean_weights[k]),
                    responsibility=float(statistics.responsibilities[k]),
                    leads=float(total.leads[k]) / num_tokens,
                    entropy=float(total.component_entropies[k]) / num_tokens,
                    tokens=self.tokens_of(total, k),
                )
                for k in range(self.head.num_mixtures)
            ],
            divergence=statistics.divergence.tolist(),
            rank=measure_rank(self.head, torch.cat(total.sample), self.decoder) if total.sample else None,
        )

    def corpus_windows(self, corpus: Sequence[Text], max_tokens: int | None) -> tuple[list[Window], int]:
        windows: list[Window] = []
        num_texts = 0
        remaining = max_tokens
        for text in corpus:
            sequence, counts = sequence_of(self.tokenizer, text, self.prefix)
            num_read = sum(counts) if remaining is None else min(sum(counts), remaining)
            if num_read:
                windows.extend(self.windows_of(sequence[: len(sequence) - sum(counts) + num_read]))
                num_texts += 1
            if remaining is not None:
                remaining -= num_read
                if not remaining:
                    break
        return windows, num_texts

    def tokens_of(self, total: "CorpusSum", k: int) -> list[TokenShare]:
        """The tokens for which component k is more responsible than on average, the largest excess first."""
        occurrences = total.token_responsibilities.sum(-1)
        share = total.token_responsibilities[:, k].sum() / occurrences.sum()
        excess = total.token_responsibilities[:, k] - share * occurrences
        values, ids = excess.topk(self.top)
        return [
            TokenShare(
                id,
                self.texts(id),
                total.token_counts[id],
                float(total.token_responsibilities[id, k]) / total.token_counts[id],
            )
            for id, value in zip(ids.tolist(), values.tolist(), strict=True)
            if value > 1e-6 * total.token_counts[id]  # with one component, only rounding exceeds
        ]


class CorpusSum:
    """The sums over a corpus, in float64 on the CPU."""

    def __init__(self, head: Any, sample_every: int | None) -> None:
        K, V = head.num_mixtures, head.out_features
        self.sample_every, self.count = sample_every, 0
        self.statistics = StatisticsSum(K)
        self.nll = self.softmax_nll = self.entropy = 0.0
        self.leads = torch.zeros(K, dtype=torch.float64)
        self.component_entropies = torch.zeros(K, dtype=torch.float64)
        self.token_responsibilities = torch.zeros(V, K, dtype=torch.float64)
        self.token_counts: Counter[int] = Counter()
        self.sample: list[Tensor] = []  # hidden states of some contexts, (m, D)

    def add(self, chunk: Chunk) -> None:
        targets, mixture = chunk.targets, chunk.mixture
        responsibilities = self.statistics.add(mixture, targets).cpu().double()
        self.nll -= float(_gather(chunk.log_probs, targets).cpu().double().sum())
        self.softmax_nll -= float(_gather(chunk.softmax_log_probs, targets).cpu().double().sum())
        self.entropy += float(entropy(chunk.log_probs).cpu().double().sum())
        self.component_entropies += mixture.component_entropies().cpu().double().sum(0)
        self.leads += torch.bincount(responsibilities.argmax(-1), minlength=len(self.leads))
        self.token_responsibilities.index_add_(0, targets.cpu(), responsibilities)
        self.token_counts.update(targets.tolist())
        if self.sample_every is not None:
            first = -self.count % self.sample_every
            self.sample.append(chunk.hidden_states[first :: self.sample_every].cpu())
        self.count += len(targets)


def softmax_log_probs(head: Any, hidden_states: Tensor, decoder: nn.Module) -> Tensor:
    """The log-probabilities (n, V) of one softmax with the head's decoder."""
    logits = head.as_decoder(decoder)(hidden_states.to(head.weight.dtype))
    return F.log_softmax(cap_logits(upcast(logits), head.softcap), dim=-1)


def _gather(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@torch.inference_mode()
def measure_rank(head: Any, hidden_states: Tensor, decoder: nn.Module) -> RankInspection | None:
    """The rank of the log-probabilities of the head, and of its softmax, for hidden states (N, D)."""
    parameters = [*decoder.parameters()]
    if not all(type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta for p in parameters):
        return None
    hidden_states, (head, decoder) = hidden_states.double(), copy.deepcopy((head, decoder))
    decoder.to("cpu", torch.float64)
    num_classes = head.num_classes or head.out_features
    classes = torch.arange(min(num_classes, RANK_CLASSES)) * num_classes // min(num_classes, RANK_CLASSES)
    mixture, softmax = [], []
    for tokens, predictions in predict_in_chunks(head, hidden_states, decoder):
        mixture.append(predictions.log_probs()[:, classes])
        softmax.append(softmax_log_probs(head, hidden_states[tokens], decoder)[:, classes])
    if not all(part.isfinite().all() for part in mixture + softmax):
        return None
    rank, softmax_rank = log_prob_rank(torch.cat(mixture)), log_prob_rank(torch.cat(softmax))
    return RankInspection(
        contexts=len(hidden_states),
        classes=len(classes),
        bound=head.in_features + 1,
        mixture=rank.rank,
        softmax=softmax_rank.rank,
        singular_values=rank.singular_values.tolist(),
        softmax_singular_values=softmax_rank.singular_values.tolist(),
    )
