"""Cuts the text of `hf-mos train`: into blocks for training, and into the windows of `evaluate` for validation."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from .chat import Chat, Messages, render
from .evaluate import IGNORED, Window, count_bytes, count_targets, encode, prefix_of, windows_over
from .texts import (
    TEXT_COLUMN,
    TOOLS_COLUMN,
    check_rows,
    check_text,
    choose_column,
    column,
    load_named,
    load_rows,
    read_lines,
    read_texts,
)
from .train_options import DataOptions

STREAMED_ROWS = 10_000  # rows packed together; the tokens after their last full block are dropped
PIECE = 4_000_000  # characters of a text file that are tokenized and packed together
PIECES_IN_MEMORY = 16  # before they are written

Rows: TypeAlias = Dataset | IterableDataset


@dataclass(frozen=True)
class ValidationText:
    """Texts to evaluate on, and the name of the data on a card."""

    rows: list[str] | list[Messages]
    data: str
    split: str | None


@dataclass(frozen=True)
class ValidationSet:
    """The windows over the validation texts; each token is a target once."""

    windows: list[Window]
    num_tokens: int
    num_bytes: int  # of what these tokens stand for
    window: int
    stride: int


# --------------------------------------------------------------------------------------------------------------- text


def load_text(options: DataOptions) -> tuple[Rows, ValidationText | None]:
    """The rows of the training set, and the validation text: given, or split off where the text is not a stream."""
    name = options.dataset_name or Path(str(options.train_file)).name
    validation, split = None, None
    share = 0.0 if options.streaming else options.validation_share
    last_part = f"the last {100 * share:g} % of the training text"
    if options.dataset_name is not None:
        dataset = load_named(options.dataset_name, options.dataset_config_name, streaming=options.streaming)
        if "train" not in dataset:
            raise ValueError(f"--dataset-name: expected a split named 'train', given {sorted(dataset)}")
        train = dataset["train"]
        if "validation" in dataset:
            validation, split = rows_of(dataset["validation"], options.text_column), "validation"
    else:
        file, end = Path(str(options.train_file)), None
        num_lines = check_text(file)
        if options.validation_file is not None:
            validation = read_texts(Path(options.validation_file), options.text_column)
            name = Path(options.validation_file).name
        elif options.is_lines and share > 0:
            end = num_lines - held_out_rows(num_lines, share)
            validation, split = ["".join(itertools.islice(read_lines(file), end, None))], last_part
        train = pieces_of(file, end, options.streaming) if options.is_lines else load_rows(file, options.streaming)
    choose_column(columns_of(train), options.text_column)
    if validation is None and share > 0:
        held_out_rows(len(train), share)
        parts = train.train_test_split(test_size=share, shuffle=False)
        train, validation, split = parts["train"], rows_of(parts["test"], options.text_column), last_part
    return train, None if validation is None else ValidationText(validation, name, split)


def held_out_rows(num_rows: int, share: float) -> int:
    """The number of rows or lines to validate on; raises a ValueError where none is left to train on."""
    held_out = math.ceil(share * num_rows)
    if held_out >= num_rows:
        raise ValueError(
            f"--validation-share: expected at least 2 rows or lines for {share:g}, --validation-file, or "
            f"--validation-share 0, given {num_rows}"
        )
    return held_out


def pieces_of(file: Path, end: int | None, streaming: bool) -> Rows:
    """The first lines of a text file, `end` of them or all, as rows of large pieces."""
    features = Features({TEXT_COLUMN: Value("string")})
    arguments: dict[str, Any] = {"file": str(file.absolute()), "end": end}
    if streaming:
        return IterableDataset.from_generator(read_pieces, features=features, gen_kwargs=arguments)
    # `datasets` keeps the rows for later runs, until the arguments change.
    arguments["changed"] = (file.stat().st_mtime_ns, file.stat().st_size)
    return Dataset.from_generator(
        read_pieces, features=features, gen_kwargs=arguments, writer_batch_size=PIECES_IN_MEMORY
    )


def read_pieces(file: str, end: int | None, changed: Any = None) -> Iterator[dict[str, str]]:
    """Yields the first lines of a text file as pieces of at least `PIECE` characters; each ends where a line ends."""
    piece: list[str] = []
    length = 0
    for line in itertools.islice(read_lines(Path(file)), end):
        piece.append(line)
        length += len(line)
        if length >= PIECE:
            yield {TEXT_COLUMN: "".join(piece)}
            piece, length = [], 0
    if piece:
        yield {TEXT_COLUMN: "".join(piece)}


def columns_of(rows: Rows) -> list[str]:
    """The names of the columns; a stream may know them only from its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def rows_of(rows: Rows, name: str) -> list[str] | list[Messages]:
    return column(Dataset.from_list(list(rows)) if isinstance(rows, IterableDataset) else rows, name)


# ------------------------------------------------------------------------------------------------ windows and blocks


def cut_windows(
    validation: ValidationText, tokenizer: PreTrainedTokenizerBase, assistant_only: bool, window: int, stride: int
) -> ValidationSet:
    """Cuts the windows that `evaluate` counts the tokens in.

    Where the tokenizer has no token for the beginning or the end of a text, the first token of a text does not count,
    nor do its bytes.
    """
    source = ", ".join(filter(None, (validation.data, validation.split)))
    prefix, rows = prefix_of(tokenizer), render(tokenizer, validation.rows, assistant_only, source)
    texts = [text for text in rows if text]
    windows = windows_over(texts, tokenizer, prefix, window, stride)
    if not windows:
        raise ValueError("validation set: expected some text, given none")
    num_bytes = count_bytes(tokenizer, texts, prefix)
    return ValidationSet(windows, count_targets(windows), num_bytes, window, stride)


def pack(rows: Rows, tokenizer: PreTrainedTokenizerBase, block_size: int, options: DataOptions) -> Rows:
    """Packs texts into blocks of tokens, one after the other; drops an incomplete block at the end.

    The rows of a dataset are texts of their own. Each begins with the tokenizer's token for the beginning, if it has
    one of its own, and ends with the one for the end. A text file is one text: its tokens are those of the whole, up
    to a length of `PIECE` characters. A longer text is tokenized and packed in pieces: no token spans two pieces, and
    each drops its incomplete block. Rows of messages are as the chat template renders them.
    """
    name = choose_column(columns_of(rows), options.text_column)
    source = str(options.train_file or options.dataset_name)

    def encode_all(texts: list[Any]) -> Iterator[tuple[list[int], list[bool]]]:
        if any(isinstance(text, Chat) for text in texts):
            yield from (encode(tokenizer, text) for text in texts)
            return
        end = [] if options.is_lines or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # As in validation, where the token before a text does not count.
        start = [] if options.is_lines else [token for token in prefix_of(tokenizer) if token not in end]
        for token_ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids:
            yield start + token_ids + end, [False] * len(start) + [True] * len(token_ids + end)

    def tokenize(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        texts = check_rows(rows[name], name, rows.get(TOOLS_COLUMN), indices[0])
        encoded = [*encode_all(render(tokenizer, texts, options.assistant_only, source, indices[0]))]
        return {
            "input_ids": [token_ids for token_ids, _ in encoded],
            "labels": [[t if count else IGNORED for t, count in zip(*row, strict=True)] for row in encoded],
        }

    def cut(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {column: [token for row in rows[column] for token in row] for column in ("input_ids", "labels")}
        whole = len(joined["labels"]) // block_size * block_size
        blocks = [slice(start, start + block_size) for start in range(0, whole, block_size)]
        blocks = [block for block in blocks if any(label != IGNORED for label in joined["labels"][block][1:])]
        return {column: [tokens[block] for block in blocks] for column, tokens in joined.items()}

    mapping: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": columns_of(rows)}
    mapping["batch_size"] = 1 if options.is_lines else 1_000  # a piece of a text file is long
    if isinstance(rows, IterableDataset):
        return rows.map(tokenize, **mapping).map(
            cut, batched=True, batch_size=1 if options.is_lines else STREAMED_ROWS
        )
    tokens = rows.map(tokenize, num_proc=options.preprocessing_workers, desc="tokenizing the training set", **mapping)
    # One batch drops tokens only at its end; a large set is cut in several batches.
    size = 1 if options.is_lines else min(max(len(tokens), 1), 100_000)
    blocks = tokens.map(cut, batched=True, batch_size=size, desc="packing the training set")
    if len(blocks) == 0 and options.assistant_only and sum(map(len, tokens["input_ids"])) >= block_size:
        raise ValueError("--assistant-only: expected turns of the assistant in the training set, given none")
    if len(blocks) == 0:
        raise ValueError(f"--block-size: expected at most the tokens of the training set, given {block_size}")
    return blocks
