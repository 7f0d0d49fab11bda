"""Cuts the text of `hf-mos train`: into blocks for training, and into the windows of `evaluate` for validation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from .evaluate import Window, prefix_of, tokenize, windows_of
from .texts import FILE_READERS, column, read_texts
from .train_options import DataOptions

STREAMED_ROWS = 10_000  # rows packed together; the tokens after their last full block are dropped

Rows: TypeAlias = Dataset | IterableDataset


@dataclass(frozen=True)
class ValidationText:
    """Texts to evaluate on, and the name of the data on a card."""

    texts: list[str]
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
            validation, split = texts_of(dataset["validation"], options.text_column), "validation"
    else:
        train = read_file(str(options.train_file), options.streaming)
        if options.validation_file is not None:
            validation = read_texts(Path(options.validation_file), options.text_column)
            name = Path(options.validation_file).name
    check_column(train, options.text_column)
    if validation is None and options.validation_share > 0 and not options.streaming:
        parts = train.train_test_split(test_size=options.validation_share, shuffle=False)
        train, validation = parts["train"], texts_of(parts["test"], options.text_column)
        validation = ["".join(validation)] if options.is_lines else validation
        split = f"the last {100 * options.validation_share:g} % of the training text"
    return train, None if validation is None else ValidationText(validation, name, split)


def read_file(file: str, streaming: bool) -> Rows:
    reader = FILE_READERS[Path(file).suffix]
    options = {"keep_linebreaks": True} if reader == "text" else {}
    return load_dataset(reader, data_files=file, split="train", streaming=streaming, **options)


def check_column(rows: Rows, name: str) -> None:
    if name not in (columns := columns_of(rows)):
        raise ValueError(f"--text-column: expected one of {columns} of the training set, given {name!r}")


def columns_of(rows: Rows) -> list[str]:
    """The names of the columns; a stream may know them only from its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def texts_of(rows: Rows, name: str) -> list[str]:
    return column(Dataset.from_list(list(rows)) if isinstance(rows, IterableDataset) else rows, name)


# ------------------------------------------------------------------------------------------------ windows and blocks


def cut_windows(text: ValidationText, tokenizer: PreTrainedTokenizerBase, window: int, stride: int) -> ValidationSet:
    """Cuts the windows that `evaluate` counts the tokens in.

    Where the tokenizer has no token for the beginning or the end of a text, the first token of a text does not count.
    """
    prefix, texts = prefix_of(tokenizer), [text for text in text.texts if text]
    windows = [w for text in texts for w in windows_of([*prefix, *tokenize(tokenizer, text)], window, stride)]
    if not windows:
        raise ValueError("expected some text in the validation set, given none")
    windows.sort(key=lambda w: len(w.inputs), reverse=True)  # rows of one length pad nothing
    return ValidationSet(
        windows, sum(len(w.targets) for w in windows), sum(len(text.encode()) for text in texts), window, stride
    )


def pack(rows: Rows, tokenizer: PreTrainedTokenizerBase, block_size: int, options: DataOptions) -> Rows:
    """Packs texts into blocks of tokens, one after the other; drops an incomplete block at the end.

    The rows of a dataset are texts of their own and each ends with the tokenizer's end-of-sequence token; the lines of
    a text file are one text.
    """
    end = [] if options.is_lines or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(rows[options.text_column], add_special_tokens=False, verbose=False).input_ids
        return {"input_ids": [row + end for row in ids]}

    def cut(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = [token for row in rows["input_ids"] for token in row]
        whole = len(tokens) // block_size * block_size
        blocks = [tokens[start : start + block_size] for start in range(0, whole, block_size)]
        return {"input_ids": blocks, "labels": blocks}

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
