"""Reads text from files and datasets."""

import glob
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from .places import check_file

Messages: TypeAlias = list[dict[str, Any]]

TEXT_COLUMN, MESSAGES_COLUMN, TOOLS_COLUMN = "text", "messages", "tools"
SPLIT = "test"
TEXT_COLUMN_HELP = "Column with the text or the chat messages of each row. If no column is named `text`: `messages`."
ASSISTANT_ONLY_HELP = "In rows of messages, compute the loss on the assistant's turns only."
# The readers of `datasets.load_dataset`.
FILE_READERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class ToolChat(NamedTuple):
    """Messages, and the tools that the assistant may call."""

    messages: Messages
    tools: list[Any]


def read_texts(file: Path, text_column: str = TEXT_COLUMN) -> list[str] | list[Messages]:
    """Reads the texts of a file: each row of .json, .jsonl, .csv and .parquet, else the file as one text.

    A row is a text, or a list of messages, see [`column`].

    Raises:
        ValueError: there is no such file, it is no UTF-8, it has no such column, or it is empty.
    """
    check_text(file)
    if reader_of(file) != "text":
        return column(load_rows(file), text_column)
    return [file.read_bytes().decode()]  # as bytes, to keep its line ends


def reader_of(file: Path) -> str:
    """The reader for the suffix of a file, in upper or lower case; that of text for another suffix."""
    return FILE_READERS.get(file.suffix.lower(), "text")


def check_text(file: Path) -> int:
    """Returns the number of lines of a text, 0 of a file of rows.

    Raises:
        ValueError: there is no such file, it is empty, or a text is no UTF-8.
    """
    check_file(file)
    if file.stat().st_size == 0:
        raise ValueError(f"file: expected some text, given {str(file)!r}, which is empty")
    try:
        return sum(1 for _ in read_lines(file)) if reader_of(file) == "text" else 0
    except UnicodeDecodeError as error:
        raise ValueError(f"file: expected UTF-8, given {str(file)!r}: {error}") from error


def read_lines(file: Path) -> Iterator[str]:
    """Yields the lines of a text file with their ends, as they are in the file."""
    with file.open(encoding="utf-8", newline="") as lines:
        yield from lines


def check_file_options(
    file: Path | None, text_column: str, config_name: str | None = None, split: str = SPLIT
) -> None:
    """Raises a ValueError where there is no such file, and for an option that has no meaning for it."""
    check_file(file, "--validation-file")
    if file is None:
        return
    if config_name is not None:
        raise ValueError(f"--dataset-config-name: expected none with --validation-file, given {config_name!r}")
    if split != SPLIT:
        raise ValueError(f"--split: expected none with --validation-file, given {split!r}")
    if reader_of(file) == "text" and text_column != TEXT_COLUMN:
        raise ValueError(f"--text-column: expected none with a file of plain text, given {text_column!r}")


def load_rows(file: Path, streaming: bool = False) -> Any:
    """The rows of a file, by the reader for its suffix; raises a ValueError where it cannot be read as such rows."""
    import pandas
    from datasets import Features, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

    # `load_dataset` takes a name for a pattern, and the working folder too where a name is relative to it.
    name = glob.escape(str(file.absolute()))
    options: dict[str, Any] = {}
    try:
        if reader_of(file) == "csv":
            # Each value as it is written: else a text "NA" is null, and one of digits a number.
            names = pandas.read_csv(file, nrows=0).columns
            options = {"features": Features(dict.fromkeys(names, Value("string"))), "keep_default_na": False}
        return load_dataset(reader_of(file), data_files=name, split="train", streaming=streaming, **options)
    except (DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"file: expected rows of {file.suffix}, given {str(file)!r}: {cause}") from error


def read_dataset(
    name: str, config_name: str | None = None, split: str = SPLIT, text_column: str = TEXT_COLUMN
) -> list[str] | list[Messages]:
    """Reads the rows of a dataset of the Hub, or of a folder that `load_dataset` reads.

    Raises:
        ValueError: it has no such split or column, or a row of the column is neither text nor messages.
    """
    return column(load_named(name, config_name, split=split), text_column)


def load_named(name: str, config_name: str | None, **options: Any) -> Any:
    """Equivalent to: `load_dataset(name, config_name, ...)`, but the lines of text files keep their ends."""
    from datasets import load_dataset, load_dataset_builder

    if hasattr(load_dataset_builder(name, config_name).config, "keep_linebreaks"):
        options["keep_linebreaks"] = True
    return load_dataset(name, config_name, **options)


def column(rows: Any, name: str) -> list[str] | list[Messages]:
    """The texts of a column, or its lists of messages. Rows without the usual column of text may have `messages`."""
    name = choose_column(rows.column_names, name)
    tools = rows[TOOLS_COLUMN][:] if TOOLS_COLUMN in rows.column_names else None
    return check_rows(rows[name][:], name, tools)


def check_rows(rows: list[Any], column: str, tools: list[Any] | None = None, start: int = 0) -> list[Any]:
    """The rows of a column, from row `start` on: texts and messages as they are, messages with their tools.

    Raises:
        ValueError: a row is neither.
    """
    for i, row in enumerate(rows, start):
        if not (isinstance(row, str) or is_messages(row)):
            kind = "null" if row is None else f"a value of type {type(row).__name__}"
            raise ValueError(f"text_column: expected text or messages in column {column!r}, given {kind} in row {i}")
    return rows if tools is None else [with_tools(*each) for each in zip(rows, tools, itertools.count(start))]


def with_tools(row: Any, tools: Any, i: int) -> Any:
    """Messages with their tools, a list or its JSON; a text, and messages without tools, as they are.

    Raises:
        ValueError: the tools of row `i` are neither.
    """
    if not tools or isinstance(row, str):
        return row
    expected = f"tools: expected a list or its JSON in column {TOOLS_COLUMN!r}"
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"{expected}, given broken JSON in row {i}: {error}") from error
    if not isinstance(tools, list | None):
        raise ValueError(f"{expected}, given a value of type {type(tools).__name__} in row {i}")
    return ToolChat(row, tools) if tools else row


def choose_column(names: list[str], name: str) -> str:
    """The column of the text; `messages` where the rows have no column of the default name."""
    if name not in names and name == TEXT_COLUMN and MESSAGES_COLUMN in names:
        return MESSAGES_COLUMN
    if name not in names:
        raise ValueError(f"text_column: expected one of {names}, given {name!r}; --text-column names another")
    return name


def is_messages(row: Any) -> bool:
    return isinstance(row, list) and all(isinstance(message, dict) and "role" in message for message in row)
