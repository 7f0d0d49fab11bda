"""The documentation inside Python: a text that every machine has."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def python_documentation(max_documents: int | None = None) -> list[str]:
    """The docstrings of the standard library and pydoc's topics, each once, in a fixed shuffled order."""
    from pydoc_data.topics import topics

    documents = list(dict.fromkeys([*topics.values(), *docstrings(Path(sysconfig.get_path("stdlib")))]))
    random.Random(0).shuffle(documents)
    return documents[:max_documents]


def docstrings(folder: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(folder.rglob("*.py")):
        if NOT_DOCUMENTATION & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # a few files of the standard library are wrong on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield text


def pydoc_topics(max_documents: int | None = None) -> list[str]:
    """The topics of pydoc alone, in a fixed shuffled order: 0.1 million words, at hand without reading the library."""
    from pydoc_data.topics import topics

    documents = list(dict.fromkeys(topics.values()))
    random.Random(0).shuffle(documents)
    return documents[:max_documents]
