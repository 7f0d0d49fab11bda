"""Makes a text of Debian's documentation packages: about 80 MB of English, on any machine with apt.

    python examples/softmax_bottleneck/debian_documentation.py debian-docs
    python examples/softmax_bottleneck/from_scratch.py --dataset-name debian-docs

Nothing is installed: the packages are downloaded and unpacked in a temporary folder. Where a package holds the source
of its pages (reStructuredText, plain text, pod), the script takes the source, else the text of the HTML. It takes a
document that stands twice once. Every hundredth document, in the order of a hash, is for validation.
"""

import gzip
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated

import typer

# What is taken of each package.
PACKAGES = {
    "linux-doc-6.1": ".rst",
    "postgresql-doc-15": ".html",
    "python3.11-doc": ".rst",
    "perl-doc": ".pod",
    "git-doc": ".txt",
    "python-django-doc": ".html",
    "sqlite3-doc": ".html",
    "developers-reference": ".html",
    "zsh-doc": ".html",
    "dict-gcide": ".dict",
}
SHORTEST = 500  # characters of a document
LARGEST_SHARE_OF_OTHERS = 0.02  # of characters beyond ASCII: translations have more
DICTIONARY_PART = 20_000  # characters of a dictionary that make a document
VALIDATION_EVERY = 100


class TextOfPage(HTMLParser):
    """Collects the text of an HTML page, without scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)

    @classmethod
    def read(cls, page: str) -> str:
        reader = cls()
        reader.feed(page)
        lines = [line.rstrip() for line in "".join(reader.parts).split("\n")]
        return "\n".join(line for line, before in zip(lines, ["", *lines], strict=False) if line or before)


def documents_of(folder: Path, kind: str) -> Iterator[str]:
    """The documents of an unpacked package."""
    for path in sorted(folder.rglob("*")):
        name = path.name.removesuffix(".gz").removesuffix(".dz").removesuffix(".txt" if kind == ".rst" else "")
        if path.is_symlink() or not path.is_file() or not name.endswith(kind):
            continue
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8", "replace")
        if kind == ".dict":
            yield from (text[at : at + DICTIONARY_PART] for at in range(0, len(text), DICTIONARY_PART))
        else:
            yield TextOfPage.read(text) if kind == ".html" else text


def is_wanted(text: str) -> bool:
    others = sum(ord(character) > 127 for character in text)
    return len(text) >= SHORTEST and others <= LARGEST_SHARE_OF_OTHERS * len(text)


def main(
    out: Annotated[Path, typer.Argument(help="The folder to make, of train.jsonl and validation.jsonl.")],
) -> None:
    if out.exists():
        raise typer.BadParameter(f"out: expected a new folder, given {out}")
    texts: dict[str, str] = {}  # by the hash
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=work, check=True)
        for package, kind in PACKAGES.items():
            archive = next(Path(work).glob(f"{package}_*.deb"))
            folder = Path(work, package)
            subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
            found = {hashlib.sha256(text.encode()).hexdigest(): text for text in documents_of(folder, kind)}
            found = {digest: text for digest, text in found.items() if is_wanted(text)}
            print(f"{package}: {len(found):,} documents, {sum(map(len, found.values())) / 1e6:.1f} million characters")
            texts |= found
    lines = [json.dumps({"text": texts[digest]}) + "\n" for digest in sorted(texts)]
    staged = out.with_name(out.name + ".unfinished")
    staged.mkdir(parents=True, exist_ok=True)
    staged.joinpath("validation.jsonl").write_text("".join(lines[::VALIDATION_EVERY]), encoding="utf-8")
    training = (line for i, line in enumerate(lines) if i % VALIDATION_EVERY)
    staged.joinpath("train.jsonl").write_text("".join(training), encoding="utf-8")
    staged.rename(out)


if __name__ == "__main__":
    typer.run(main)
