"""Measures nats per token, perplexity and bits per byte of a causal LM, mixture or softmax, on text.

```python
result = evaluate(model, tokenizer, [Path("book.txt").read_text()], stride=256)
print(result.perplexity, result.bits_per_byte)
```
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .chat import Chat, Text

LONGEST_DEFAULT_WINDOW = 2048
IGNORED = -100  # in place of a target
# What configs call the number of positions.
POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "n_positions")
# The model types whose first token has the position pad_token_id + 1: the rows before it are no positions.
POSITIONS_AFTER_PAD = (
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
ROWS_AT_A_TIME = 256  # rows of a softmax's logits that are upcast to fp32 at a time


@dataclass(frozen=True)
class Evaluation:
    """The measurement over all texts."""

    nats: float  # the sum over tokens
    num_tokens: int
    num_bytes: int  # of the texts in UTF-8, or of what counts of them
    num_texts: int
    window: int
    stride: int
    prefix_token_id: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.num_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The measures and the fields, for JSON."""
        measures = {name: getattr(self, name) for name in ("nats_per_token", "perplexity", "bits_per_byte")}
        return json_values(measures | vars(self))


def perplexity_of(nats_per_token: float) -> float:
    """Equivalent to: `math.exp(nats_per_token)`, but infinity above 709 nats, as of a model that diverged."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def json_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values, `None` in place of those that are not finite, which JSON has no number for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Window(NamedTuple):
    """A row of a batch: the tokens that the model reads, and the targets of the last of them."""

    inputs: Tensor  # (n,)
    targets: Tensor  # (m,), the successors of the last m inputs; -100 where one does not count

    @property
    def aligned_targets(self) -> Tensor:
        """The targets (n,), each at the place of its input; -100 at the inputs before the last m."""
        return F.pad(self.targets.long(), (len(self.inputs) - len(self.targets), 0), value=IGNORED)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    prefix_token_id: int | None = None,
    track: Callable[[Sequence[list[Window]]], Iterable[list[Window]]] = iter,
) -> Evaluation:
    """Measures the mean negative log-likelihood of texts, and counts each token exactly once.

    Each text begins after the prefix token, which is read and not counted, so that its first token is counted too.
    A window slides over the text by `stride` tokens, and of each window only the tokens that no window before it
    counted are counted: those have at least `window - stride` tokens before them, but at the start of the text. With
    a stride of the window's length this is the rolling log-likelihood of lm-eval.

    A mixture's loss is computed without a tensor of the vocabulary's width, a softmax's from its logits.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own.
        texts: each a text by itself, or a [`Chat`], of which the assistant's turns count if they were searched. Text
            that is empty is left out.
        window: tokens that the model reads at a time. `None`: its positions, at most 2048.
        stride: how far the window slides, in [1, window]. `None`: half of the window.
        batch_size: windows at a time.
        prefix_token_id: `None`: the tokenizer's token for the beginning of a text, else for its end.
        track: takes the list of batches and yields them, to show progress.

    Raises:
        ValueError: there is no text, the window or the stride is out of range, or the tokenizer has no such token.
        FloatingPointError: the loss is not finite.
    """
    if model.training:
        raise ValueError("model: expected one in evaluation mode, given one in training mode; call model.eval()")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, given {batch_size}")
    window, stride = choose_window(model.config, window, stride)
    rows = embedding_rows(model)
    if prefix_token_id is not None and not 0 <= prefix_token_id < rows:
        raise ValueError(f"prefix_token_id: expected a token below the model's {rows}, given {prefix_token_id}")
    prefix = choose_prefix(tokenizer, prefix_token_id)
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("texts: expected some text, given none")
    windows = windows_over(texts, tokenizer, [prefix], window, stride)
    if not windows:
        raise ValueError("texts: expected at least one token, given text of which the tokenizer makes none")
    check_tokens(model, windows)
    batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    nats = 0.0
    for batch in track(batches):
        inputs = {name: tensor.to(model.device) for name, tensor in collate(batch).items()}
        loss = float(target_nll(model, **inputs).cpu().double().sum())
        if not math.isfinite(loss):
            raise FloatingPointError(f"expected a finite loss, given {loss}; weights of dtype {model.dtype}")
        nats += loss
    return Evaluation(
        nats=nats,
        num_tokens=count_targets(windows),
        num_bytes=count_bytes(tokenizer, texts, [prefix]),
        num_texts=len(texts),
        window=window,
        stride=stride,
        prefix_token_id=prefix,
    )


def choose_window(config: PreTrainedConfig, window: int | None, stride: int | None) -> tuple[int, int]:
    positions = positions_of(config)
    if window is None:
        window = min(positions or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    if window < 1 or (positions is not None and window > positions):
        most = "" if positions is None else f" and at most the model's {positions} positions"
        raise ValueError(f"window: expected at least 1{most}, given {window}")
    if stride is None:
        stride = max(window // 2, 1)
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected at least 1 and at most the window's {window}, given {stride}")
    return window, stride


def positions_of(config: PreTrainedConfig) -> int | None:
    """The model's number of positions; `None`: its config names none."""
    config = config.get_text_config()
    found = (getattr(config, name, None) for name in POSITIONS)
    positions = next((positions for positions in found if positions is not None and positions > 0), None)
    if positions is None or config.model_type not in POSITIONS_AFTER_PAD:
        return positions
    return positions - (config.pad_token_id or 0) - 1


def choose_prefix(tokenizer: PreTrainedTokenizerBase, prefix_token_id: int | None) -> int:
    for token in (prefix_token_id, *prefix_of(tokenizer)):
        if token is not None:
            return token
    raise ValueError(
        "prefix_token_id: expected the token that stands before a text (--prefix-token-id), as the tokenizer has none "
        "for a text's beginning or end, given none"
    )


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token for the beginning of a text, else for its end, in a list; an empty list where there is neither."""
    return [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def encode(tokenizer: PreTrainedTokenizerBase, text: Text) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and whether each counts: all, or those that begin in a turn of the assistant."""
    if isinstance(text, str) or text.turns is None:
        token_ids = tokenize(tokenizer, text if isinstance(text, str) else text.text)
        return token_ids, [True] * len(token_ids)
    encoded = tokenizer(text.text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    turns = text.turns
    return encoded.input_ids, [any(a <= start < b for a, b in turns) for start, _ in encoded.offset_mapping]


def sequence_of(tokenizer: PreTrainedTokenizerBase, text: Text, prefix: list[int]) -> tuple[list[int], list[bool]]:
    """The tokens of a text behind a prefix token, and whether each counts; a chat may begin with that token itself."""
    token_ids, counts = encode(tokenizer, text)
    prefix = prefix_before(text, token_ids, prefix)
    return [*prefix, *token_ids], [False] * len(prefix) + counts


def prefix_before(text: Text, token_ids: list[int], prefix: list[int]) -> list[int]:
    """The prefix of a text of these tokens; none where it is a chat that begins with the prefix token itself."""
    return [] if isinstance(text, Chat) and token_ids[:1] == prefix else prefix


def windows_over(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, prefix: list[int], window: int, stride: int
) -> list[Window]:
    """The windows over all texts, the longest first: rows of one length pad nothing.

    Raises:
        ValueError: turns of the assistant were searched, and no token counts.
    """
    windows = [w for text in texts for w in windows_of(*sequence_of(tokenizer, text, prefix), window, stride)]
    if not windows and any(isinstance(text, Chat) and text.turns is not None for text in texts):
        raise ValueError("--assistant-only: expected turns of the assistant in the text, given none")
    return sorted(windows, key=lambda w: len(w.inputs), reverse=True)


def windows_of(token_ids: list[int], counts: list[bool], window: int, stride: int) -> Iterator[Window]:
    """Yields windows over a prefix token and a text. Each token of the text that counts is a target once."""
    tokens = torch.tensor(token_ids, dtype=torch.int32)  # windows are views of it
    targets = tokens.masked_fill(~torch.tensor(counts, dtype=torch.bool), IGNORED)
    counted, end = 0, min(window, len(tokens) - 1)
    while counted < end:
        if any(counts[counted + 1 : end + 1]):
            yield Window(tokens[max(end - window, 0) : end], targets[counted + 1 : end + 1])
        counted, end = end, min(end + stride, len(tokens) - 1)


def count_targets(windows: Iterable[Window]) -> int:
    return sum(int((w.targets != IGNORED).sum()) for w in windows)


def count_bytes(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], prefix: list[int]) -> int:
    """The bytes in UTF-8 of what counts, without those of a first token that no prefix token stands before."""
    counted = sum(len((text if isinstance(text, str) else text.counted_text()).encode()) for text in texts)
    return counted - sum(bytes_of_first(tokenizer, text, prefix) for text in texts)


def bytes_of_first(tokenizer: PreTrainedTokenizerBase, text: Text, prefix: list[int]) -> int:
    """The bytes in UTF-8 of a first token that no prefix token stands before, with the spaces before it.

    0 where a prefix token stands before it, and where it would not count anyway.
    """
    if prefix and not isinstance(text, Chat):
        return 0  # the text is not tokenized again
    token_ids, counts = encode(tokenizer, text)
    if prefix_before(text, token_ids, prefix) or not any(counts[:1]):
        return 0
    written = text if isinstance(text, str) else text.text
    if not tokenizer.is_fast:
        return len(str(tokenizer.decode(token_ids[:1])).encode())
    encoded = tokenizer(written, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return len(written[: encoded.offset_mapping[0][1]].encode())


def embedding_rows(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.num_embeddings  # the weight may be sharded


def check_tokens(model: PreTrainedModel, windows: list[Window]) -> None:
    rows = embedding_rows(model)
    largest = max(int(part.max()) for w in windows for part in w)
    if largest >= rows:
        raise ValueError(
            f"tokenizer: expected tokens below the model's {rows}, given {largest}; is it the model's own?"
        )


def collate(windows: Sequence[Window]) -> dict[str, Tensor]:
    """Makes a batch of windows: `input_ids`, `attention_mask` and `targets`, -100 where none, of (rows, longest)."""
    shape = (len(windows), max(len(w.inputs) for w in windows))
    input_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    targets = torch.full(shape, IGNORED)
    for row, w in enumerate(windows):
        end = len(w.inputs)
        input_ids[row, :end] = w.inputs
        attention_mask[row, :end] = 1
        targets[row, end - len(w.targets) : end] = w.targets
    return {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}


@torch.no_grad()
def target_nll(model: Any, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> Tensor:
    """The nll of each target (rows, tokens), in nats, fp32; zero where there is none.

    It calls the model's own forward, whose hooks gather weights that are sharded.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    # Not where the class is of the code beside a checkpoint, which has no scores.
    if getattr(model, "mos_head", None) is not None and model.score_batch is not None:
        return -model(**inputs, shift_labels=targets, fused_lm_head=True).log_probs
    logits = model(**inputs).logits
    targets = targets.to(logits.device)
    counts = targets != IGNORED
    parts = zip(logits[counts].split(ROWS_AT_A_TIME), targets[counts].split(ROWS_AT_A_TIME), strict=True)
    nll = [F.cross_entropy(rows.float(), row_targets, reduction="none") for rows, row_targets in parts]
    return torch.zeros(counts.shape, device=logits.device).masked_scatter(counts, torch.cat(nll))
