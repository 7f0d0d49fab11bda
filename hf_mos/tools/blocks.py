"""Cuts the text of `hf-mos train`: into blocks for training, and into the windows of `evaluate` for validation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from .chat import Chat, Messages, render
from .evaluate import IGNORED, Window, count_bytes, count_targets, encode, prefix_of, sequence_of, windows_of
from .texts import FILE_READERS, check_text, choose_column, column, load_rows, read_texts
from .train_options import DataOptions

STREAMED_ROWS = 10_000  # rows packed together; the tokens after their last full block are dropped

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
    num_bytes: int
    window: int
    stride: int


# --------------------------------------------------------------------------------------------------------------- text


def load_text(options: DataOptions) -> tuple[Rows, ValidationText | None]:
    """The rows of the training set, and the validation text: given, or split off where the text is not a stream."""
    name = options.dataset_name or Path(str(options.train_file)).name
    validation, split = None, None
    if options.dataset_name is not None:
        dataset = load_dataset(options.dataset_name, options.dataset_config_name, streaming=options.streaming)
        if "train" not in dataset:
            raise ValueError(f"--dataset-name: expected a split named 'train', given {sorted(dataset)}")
        train = dataset["train"]
        if "validation" in dataset:
            validation, split = rows_of(dataset["validation"], options.text_column), "validation"
    else:
        train = read_file(str(options.train_file), options.streaming)
        if options.validation_file is not None:
            validation = read_texts(Path(options.validation_file), options.text_column)
            name = Path(options.validation_file).name
    choose_column(columns_of(train), options.text_column)
    if validation is None and options.validation_share > 0 and not options.streaming:
        if math.ceil(options.validation_share * len(train)) >= len(train):
            raise ValueError(
                f"--validation-share: expected more rows or lines to take {options.validation_share:g} of, or "
                f"--validation-file, or --validation-share 0, given {len(train)}"
            )
        parts = train.train_test_split(test_size=options.validation_share, shuffle=False)
        train, validation = parts["train"], rows_of(parts["test"], options.text_column)
        validation = ["".join(map(str, validation))] if options.is_lines else validation
        split = f"the last {100 * options.validation_share:g} % of the training text"
    return train, None if validation is None else ValidationText(validation, name, split)


def read_file(file: str, streaming: bool) -> Rows:
    check_text(Path(file))
    options = {"keep_linebreaks": True} if FILE_READERS[Path(file).suffix] == "text" else {}
    return load_rows(Path(file), streaming=streaming, **options)


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

    Where the tokenizer has no token for the beginning or the end of a text, the first token of a text does not count.
    """
    prefix, texts = prefix_of(tokenizer), [text for text in render(tokenizer, validation.rows, assistant_only) if text]
    windows = [w for text in texts for w in windows_of(*sequence_of(tokenizer, text, prefix), window, stride)]
    if not windows:
        raise ValueError("expected some text in the validation set, given none")
    windows.sort(key=lambda w: len(w.inputs), reverse=True)  # rows of one length pad nothing
    return ValidationSet(windows, count_targets(windows), count_bytes(texts), window, stride)


def pack(rows: Rows, tokenizer: PreTrainedTokenizerBase, block_size: int, options: DataOptions) -> Rows:
    """Packs texts into blocks of tokens, one after the other; drops an incomplete block at the end.

    The rows of a dataset are texts of their own and each ends with the tokenizer's end-of-sequence token; the lines of
    a text file are one text. Rows of messages are as the chat template renders them.
    """
    name = choose_column(columns_of(rows), options.text_column)

    def encode_all(texts: list[Any]) -> Iterator[tuple[list[int], list[bool]]]:
        if any(isinstance(text, Chat) for text in texts):
            yield from (encode(tokenizer, text) for text in texts)
            return
        end = [] if options.is_lines or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for token_ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids:
            yield token_ids + end, [True] * len(token_ids + end)

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        encoded = [*encode_all(render(tokenizer, rows[name], options.assistant_only))]
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

    if isinstance(rows, IterableDataset):
        return rows.map(tokenize, batched=True, remove_columns=columns_of(rows)).map(
            cut, batched=True, batch_size=STREAMED_ROWS
        )
    tokens = rows.map(
        tokenize,
        batched=True,
        remove_columns=rows.column_names,
        num_proc=options.preprocessing_workers,
        desc="tokenizing the training set",
    )
    # One batch drops tokens only at its end; a large set is cut in several batches.
    size = min(max(len(tokens), 1), 100_000)
    blocks = tokens.map(cut, batched=True, batch_size=size, desc="packing the training set")
    if len(blocks) == 0:
        raise ValueError(f"expected at least {block_size} tokens (--block-size) in the training set, given fewer")
    return blocks
