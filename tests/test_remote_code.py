"""The code that travels with a checkpoint: its size, and imports that work in a flat copy of its folder."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_mos

FILES = sorted((Path(hf_mos.__file__).parent / "remote_code").glob("**/*.py"))
NAMES = {file.stem for file in FILES}
OUTSIDE = {*sys.stdlib_module_names, "torch", "transformers", "safetensors"}
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def nodes(file: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]


def test_it_is_small() -> None:
    assert len(FILES) <= 12
    assert len({file.parent for file in FILES}) == 1  # transformers copies no folder in it
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in FILES) <= 2400


@each_file
def test_it_imports_only_what_is_installed_and_its_own_files(file: Path) -> None:
    for node in nodes(file):
        if isinstance(node, ast.Import):
            assert {name.name.partition(".")[0] for name in node.names} <= OUTSIDE
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert str(node.module).partition(".")[0] in OUTSIDE
        elif isinstance(node, ast.ImportFrom):  # transformers finds `from .name import x` alone
            assert node.level == 1
            assert node.module in NAMES


@each_file
def test_it_imports_nothing_by_a_string(file: Path) -> None:
    for node in nodes(file):
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            assert name not in ("__import__", "import_module", "importlib")


def test_its_imports_form_no_circle() -> None:
    graph = {
        file.stem: {node.module for node in nodes(file) if isinstance(node, ast.ImportFrom) and node.level == 1}
        for file in FILES
    }
    assert {*TopologicalSorter(graph).static_order()} == NAMES  # raises a CycleError
