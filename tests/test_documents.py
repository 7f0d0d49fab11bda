"""The pages: README.md and the evidence's index stay short, and every file that a page links to or names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("hf_mos", "examples", "model_cards", "tests")
PAGES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
# [text](target), ![image](target), and the definition [name]: target.
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
REFERENCE = re.compile(r"\]\[([^\]]+)\]")
MODULE = re.compile(r"`([\w/.-]+\.py)`")
MODULES = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
NAMED_FILE = re.compile(r"(?<![\w/.-])(?:examples|hf_mos|tests)/[\w/.-]+\.(?:py|md|yaml|png|json)\b")


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 12_000


def test_the_index_of_the_evidence_is_short() -> None:
    assert (ROOT / "examples" / "softmax_bottleneck" / "README.md").stat().st_size <= 4096


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [name for name in NAMED_FILE.findall(text) if not (ROOT / name).is_file()]
    missing += [name for name in MODULE.findall(text) if not any(path.match(name) for path in MODULES)]
    missing += [name for name in REFERENCE.findall(text) if f"\n[{name}]: " not in text]
    for target in (inline or defined for inline, defined in LINK.findall(text)):
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        linked = page.parent / path if path else page
        if not linked.exists() or (heading and heading not in headings(linked)):
            missing.append(target)
    assert not missing


def headings(document: Path) -> list[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
