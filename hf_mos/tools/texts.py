"""Reads text from files and datasets."""

from pathlib import Path
from typing import Any, TypeAlias

from .places import check_file

Messages: TypeAlias = list[dict[str, Any]]

TEXT_COLUMN, MESSAGES_COLUMN = "text", "messages"
TEXT_COLUMN_HELP = "Column with the text or the chat messages of each row. If no column is named `text`: `messages`."
ASSISTANT_ONLY_HELP = "In rows of messages, compute the loss on the assistant's turns only."
# The readers of `datasets.load_dataset`.
FILE_READERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_texts(file: Path, text_column: str = TEXT_COLUMN) -> list[str] | list[Messages]:
    """Reads the texts of a file: each row of .json, .jsonl, .csv and .parquet, else the file as one text.

    A row is a text, or a list of messages, see [`column`].

    Raises:
        ValueError: there is no such file, it is no UTF-8, it has no such column, or it is empty.
    """
    check_text(file)
    if FILE_READERS.get(file.suffix, "text") != "text":
        return column(load_rows(file), text_column)
    return [file.read_bytes().decode()]  # as bytes, to keep its line ends


def check_text(file: Path) -> None:
    """Raises a ValueError where there is no such file, where it is empty, and where a text is no UTF-8."""
    check_file(file)
    if file.stat().st_size == 0:
        raise ValueError(f"file: expected some text, given {str(file)!r}, which is empty")
    if FILE_READERS.get(file.suffix, "text") == "text":
        try:
            with file.open(encoding="utf-8") as lines:
                for _ in lines:
                    pass
        except UnicodeDecodeError as error:
            raise ValueError(f"file: expected UTF-8, given {str(file)!r}: {error}") from error


def load_rows(file: Path, **options: Any) -> Any:
    """The rows of a file, by the reader for its suffix; raises a ValueError where it cannot be read as such rows."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(FILE_READERS.get(file.suffix, "text"), data_files=str(file), split="train", **options)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"file: expected rows of {file.suffix}, given {str(file)!r}: {cause}") from error


def read_dataset(
    name: str, config_name: str | None = None, split: str = "test", text_column: str = TEXT_COLUMN
) -> list[str] | list[Messages]:
    """Reads the rows of a dataset of the Hub, or of a folder that `load_dataset` reads.

    Raises:
        ValueError: it has no such split or column.
    """
    from datasets import load_dataset

    return column(load_dataset(name, config_name, split=split), text_column)


def column(rows: Any, name: str) -> list[str] | list[Messages]:
    """The texts of a column, or its lists of messages. Rows without the usual column of text may have `messages`."""
    name = choose_column(rows.column_names, name)
    texts = rows[name][:]
    if not (all(isinstance(text, str) for text in texts) or all(is_messages(text) for text in texts)):
        raise ValueError(f"text_column: expected a column of text or of messages, given {name!r}")
    return texts


def choose_column(names: list[str], name: str) -> str:
    """The column of the text; `messages` where the rows have no column of the default name."""
    if name not in names and name == TEXT_COLUMN and MESSAGES_COLUMN in names:
        return MESSAGES_COLUMN
    if name not in names:
        raise ValueError(f"text_column: expected one of {names}, given {name!r}")
    return name


def is_messages(row: Any) -> bool:
    return isinstance(row, list) and all(isinstance(message, dict) and "role" in message for message in row)
