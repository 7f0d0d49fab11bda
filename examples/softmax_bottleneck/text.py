"""The text of the questions: blocks of tokens for training, validation and test."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from training import shuffled
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_mos.tools.flags import new_flag, with_flags

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<unk>"
SPLITS = ("train", "valid", "test")
MODEL_BATCH = 64  # blocks in an evaluation

VocabSize = Annotated[
    int, typer.Option(help="Vocabulary of the byte-level BPE tokenizer that is trained on the text.")
]
Words = Annotated[bool, typer.Option("--words", help="Use words as tokens, as in the literature.")]


HELP = {
    "data_dir": "A folder of train.txt, valid.txt and test.txt: Penn Treebank.",
    "train_file": "A text file to train on.",
    "validation_file": "A text file, half to validate and half to test.",
    "dataset_name": "A dataset of the Hub, or a folder that load_dataset reads.",
    "dataset_config_name": "Configuration of the dataset.",
}


@dataclass(frozen=True)
class Source:
    """The source of the text: one of the three, or none for the documentation that ships inside Python."""

    data_dir: Path | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("data_dir", "train_file", "dataset_name") if getattr(self, name) is not None]
        if len(given) > 1:
            raise typer.BadParameter(f"expected one of --data-dir, --train-file, --dataset-name, given {given}")
        if (self.train_file is None) != (self.validation_file is None):
            raise typer.BadParameter("expected --train-file and --validation-file, both or neither, given one")
        for path in self.files().values():
            if not path.is_file():
                raise typer.BadParameter(f"expected a file, given {path}, which is none")

    @property
    def name(self) -> str:
        path = self.data_dir or self.train_file
        if path is None and self.dataset_name and Path(self.dataset_name).is_dir():
            path = Path(self.dataset_name)
        return path.name if path else self.dataset_name or "python documentation"

    def files(self) -> dict[str, Path]:
        if self.data_dir is not None:
            return {split: self.data_dir / f"{split}.txt" for split in SPLITS}
        if self.train_file is not None and self.validation_file is not None:
            return {"train": self.train_file, "valid": self.validation_file}
        return {}

    def texts(self) -> dict[str, list[str]]:
        """The texts of each split. Without a test split, the last half of the validation texts is the test split."""
        if self.files():
            found = {split: path.read_text(encoding="utf-8").split("\n") for split, path in self.files().items()}
        elif self.dataset_name is not None:
            from datasets import load_dataset

            dataset: Any = load_dataset(self.dataset_name, self.dataset_config_name)
            names = {"train": "train", "valid": "validation", "test": "test"}
            found = {split: list(dataset[name]["text"]) for split, name in names.items() if name in dataset}
        else:
            sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
            from python_documentation import python_documentation

            documents = python_documentation()
            found = {"train": [text for i, text in enumerate(documents) if i % 10], "valid": documents[::10]}
        if "test" not in found:
            half = len(found["valid"]) // 2
            found["valid"], found["test"] = found["valid"][:half], found["valid"][half:]
        return found


def with_source(main: Callable[..., None]) -> Callable[..., None]:
    """Gives a script the flags that choose its text, in place of its parameter `source`."""
    options = ((each, typer.Option(help=HELP[each.name])) for each in fields(Source))
    flags = [new_flag(each.name, Annotated[each.type, option]) for each, option in options]  # type: ignore[valid-type]
    return with_flags(main, "source", flags, lambda given: Source(**given))


@dataclass(frozen=True)
class Text:
    """Blocks of tokens, each (blocks, block_size)."""

    name: str
    vocab_size: int
    train: Tensor
    valid: Tensor
    test: Tensor
    tokenizer: PreTrainedTokenizerFast | None = None
    measured = ("valid", "test")

    def batches(self, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        for chosen in shuffled(len(self.train), batch_size, seed):
            yield inputs_of(self.train[chosen])

    @torch.no_grad()
    def nats(self, model: PreTrainedModel, split: str) -> float:
        model.eval()
        blocks = self.valid if split == "valid" else self.test
        total = sum(
            len(batch) * model(**inputs_of(batch), skip_logits=True).loss.item() for batch in blocks.split(MODEL_BATCH)
        )
        return total / len(blocks)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a run that identify the text."""
        return {"text": self.name, "vocab_size": self.vocab_size, "blocks": [len(self.train), *self.train.shape[1:]]}


def inputs_of(blocks: Tensor) -> dict[str, Tensor]:
    return {"input_ids": blocks, "labels": blocks}


def train_tokenizer(texts: list[str], vocab_size: int, words: bool) -> Tokenizer:
    """Byte-level BPE, or every word of the texts."""
    if words:
        # WordLevelTrainer counts the <unk> of Penn Treebank twice, as a word and as the unknown one.
        counts = Counter(word for text in texts for word in text.split())
        vocabulary = dict.fromkeys([END_OF_TEXT, UNKNOWN, *(word for word, _ in counts.most_common())])
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        return tokenizer
    byte_pairs = ByteLevelBPETokenizer()
    byte_pairs.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return byte_pairs._tokenizer


def load_text(
    source: Source,
    vocab_size: int,
    words: bool = False,
    block_size: int = 64,
    max_valid_blocks: int = 1024,
) -> Text:
    """Cuts every split into blocks; each text ends with a token of its own."""
    texts = source.texts()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts["train"], vocab_size, words),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )
    tokenizer = fast.backend_tokenizer

    def blocks(split: str) -> Tensor:
        end = fast.eos_token_id
        encodings = tokenizer.encode_batch([text for text in texts[split] if text])
        ids = torch.tensor([token for encoding in encodings for token in [*encoding.ids, end]])
        count = len(ids) // block_size
        if count == 0:
            raise typer.BadParameter(f"{split}: expected at least {block_size} tokens, given {len(ids)}")
        return ids[: count * block_size].view(count, block_size)

    return Text(
        f"{source.name}, words" if words else source.name,
        tokenizer.get_vocab_size(),
        blocks("train"),
        blocks("valid")[:max_valid_blocks],
        blocks("test")[:max_valid_blocks],
        fast,
    )
