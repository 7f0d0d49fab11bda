"""Sends a checkpoint to the Hub in one commit: weights, code, tokenizer and card.

```python
push(Path("gpt2-mos"), "user/gpt2-mos")
```
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import CommitOperationAdd, HfApi
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import logging

from ..remote_code.mos_checkpoint import STAGING_PREFIX, check_files
from .card import CARD_FILE, address
from .exit_codes import before_work
from .places import check_checkpoint, read_json, read_text

logger = logging.get_logger(__name__)

TOKENIZER_FILE = "tokenizer_config.json"
# Files beside the weights: of configs, a tokenizer, a processor or a card. Other files of the folder stay there.
SENT = (
    *("*config.json", "tokenizer*.json", "vocab*.json", "*tokens*.json", "chat_template*", "*.jinja", "*.model"),
    *("*.tiktoken", "vocab*.txt", "merges.txt", "LICENSE*", "additional_chat_templates/*.jinja", CARD_FILE),
)
CONFIGS_WITH_CODE = (TOKENIZER_FILE, "*processor_config.json")  # beside the model's own
PICTURES = ("*.png", "*.html")  # those that the card names


@dataclass(frozen=True)
class Pushed:
    """The commit that holds the checkpoint."""

    repo: str
    revision: str  # the commit that holds model, code, tokenizer and card
    url: str
    files: list[str]
    card_revision: str | None  # the commit after it, in which the card names `revision`


def push(
    folder: Path,
    repo: str,
    *,
    branch: str | None = None,
    private: bool | None = None,
    message: str = "Upload a mixture of softmaxes",
    token: str | None = None,
    pin: bool = True,
) -> Pushed:
    """Checks the folder, creates the repository if there is none, and sends the files in one commit.

    The Hub takes a commit whole or not at all, so nothing is ever half there. Its hash is known only afterwards: a
    second commit then writes it into the card's code, as the revision to load.

    Args:
        folder: a checkpoint as [`~MoSForCausalLM.save_pretrained`] or [`convert`] leaves it, with its card.
        repo: "user/name".
        branch: `None`: the default branch. Made if there is none.
        private: of a new repository; `None`: as the account has it.
        message: of the commit.
        token: `None`: of the login.
        pin: make the second commit.

    Raises:
        ValueError: the folder holds no whole checkpoint of a mixture.
        OSError: a file is broken, or the Hub refuses (`HfHubHTTPError`).
    """
    with before_work():
        files = files_of(folder)
    api = HfApi(token=token)
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if branch is not None:
        api.create_branch(repo, branch=branch, exist_ok=True)
    card = read_text(folder / CARD_FILE)
    operations = [CommitOperationAdd(name, folder / name) for name in files if name != CARD_FILE]
    operations.append(CommitOperationAdd(CARD_FILE, address(card, repo, branch or "main").encode()))
    commit = api.create_commit(repo, operations, commit_message=message, revision=branch)
    card_revision = pin_card(api, repo, card, commit.oid, branch) if pin else None
    return Pushed(repo, commit.oid, commit.commit_url, files, card_revision)


def pin_card(api: HfApi, repo: str, card: str, revision: str, branch: str | None = None) -> str | None:
    """Sends the card with the revision in its code. Returns the hash of that commit, or `None` if it fails.

    What it is about is on the Hub by then, so a failure here is a warning.
    """
    operation = CommitOperationAdd(CARD_FILE, address(card, repo, revision).encode())
    message = f"Pin {revision[:7]} in the card"
    try:
        return api.create_commit(repo, [operation], commit_message=message, revision=branch).oid
    except Exception as error:  # also of the HTTP library, which is another in each version of huggingface_hub
        logger.warning(f"{repo}: the model is there, but its card names no revision: {error}")
        return None


def code_of(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """The names of the Python files that the configs ask for, and of those that these import."""
    found = code_named_by(config) or ["modeling_mos.py"]
    for path in (path for pattern in CONFIGS_WITH_CODE for path in folder.glob(pattern)):
        found += code_named_by(read_json(path))
    for name in found:
        yield name
        for module in get_relative_imports(folder / name):
            if f"{module}.py" not in found:
                found.append(f"{module}.py")


def code_named_by(config: dict[str, Any]) -> list[str]:
    """The names of the Python files that a config's `auto_map` asks for."""
    places = config.get("auto_map", {})
    places = [places[name] for name in sorted(places)] if isinstance(places, dict) else [places]
    # A tokenizer has a pair of classes, of which one may be null.
    classes = [name for place in places for name in (place if isinstance(place, list) else [place])]
    # The code of "user/repo--module.Class" is in that repository.
    return [f"{name.partition('.')[0]}.py" for name in classes if name is not None and "--" not in name]


def files_of(folder: Path) -> list[str]:
    """The files of a complete checkpoint in a folder, without other files.

    Raises:
        ValueError: it is none, or the last save was cut off, or code or card are missing.
        OSError: a file of the weights is missing or broken.
    """

    def refuse(expected: str, given: str) -> NoReturn:
        raise ValueError(f"{folder}: expected {expected}, given {given}")

    config = check_checkpoint(folder)
    if config.get("transformers_weights") is not None or any(folder.glob(f"{STAGING_PREFIX}*")):
        refuse("a checkpoint that was saved to its end", "one that was cut off; load and save it again")
    weights = sorted(check_files(folder, None))
    if not weights:
        refuse("weights in safetensors", "none")
    weights += [path.name for path in folder.glob("model.safetensors.index.json")]
    sent = (path for pattern in SENT for path in folder.glob(pattern) if path.is_file())
    beside = {path.relative_to(folder).as_posix() for path in sent}
    for name in code_of(folder, config):
        if not (folder / name).is_file():
            refuse("the code beside the weights", f"none of {name}; load and save it again")
        beside.add(name)
    if CARD_FILE not in beside:
        refuse(f"a card, {CARD_FILE}", "none; hf-mos card makes one")
    card = read_text(folder / CARD_FILE)
    beside |= {path.name for pattern in PICTURES for path in folder.glob(pattern) if path.name in card}
    if TOKENIZER_FILE not in beside:
        logger.warning(f"{folder}: no tokenizer is sent, as there is none")
    return sorted({*beside, *weights})
