"""The documentation inside Python: a text that every machine has."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def python_documentation(max_documents: int | None = None) -> list[str]:
    """The docstrings of the standard library and pydoc's topics, each once, in a fixed shuffled order.

    With `max_documents` it reads no more files than it needs.
    """
    from pydoc_data.topics import topics

    paths = library_files()
    if max_documents is not None:
        random.Random(0).shuffle(paths)
    documents = dict.fromkeys(topics.values())
    for path in paths:
        if max_documents is not None and len(documents) >= max_documents:
            break
        documents.update(dict.fromkeys(docstrings(path)))
    return shuffled(documents)[:max_documents]


def pydoc_topics(max_documents: int | None = None) -> list[str]:
    """The topics of pydoc alone, in a fixed shuffled order: 65,000 words, without reading the library."""
    from pydoc_data.topics import topics

    return shuffled(dict.fromkeys(topics.values()))[:max_documents]


def shuffled(documents: dict[str, None]) -> list[str]:
    texts = [*documents]
    random.Random(0).shuffle(texts)
    return texts


def library_files() -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(library.rglob("*.py"))
    return [path for path in paths if not NOT_DOCUMENTATION & set(path.relative_to(library).parts)]


def docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a few files of the standard library are wrong on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text
