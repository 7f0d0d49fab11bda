"""The readable text of single tokens, for any tokenizer."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..evaluate import tokenize

REPLACEMENT = "\ufffd"  # stands for bytes of an incomplete character
LONGEST_CHARACTER = 4  # bytes of UTF-8
BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """The readable text of tokens, with the space before a word; bytes of an incomplete character are escaped.

    A token is decoded behind a letter, as some tokenizers drop the space before what they decode first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer  # its methods return one or many
        self.bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self.anchor = tokenize(tokenizer, "a")[-1:]
        self.known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """The text of one token by itself."""
        if token_id not in self.known:
            text = self.decode([token_id])
            self.known[token_id] = self.spell(token_id) if not text or REPLACEMENT in text else text
        return self.known[token_id]

    def of_text(self, token_ids: list[int]) -> list[str]:
        """The texts of consecutive tokens; a character that several tokens form belongs to the last of them."""
        texts: list[str] = []
        partial: list[int] = []
        for token_id in token_ids:
            before = self.decode(partial).rstrip(REPLACEMENT) if partial else ""
            partial.append(token_id)
            whole = self.decode(partial)
            if REPLACEMENT not in whole:
                texts.append(whole[len(before) :] or self.spell(token_id))
                partial = []
            else:
                texts.append(self(token_id))
                if len(partial) == LONGEST_CHARACTER or not whole.endswith(REPLACEMENT):
                    partial = []
        return texts

    def decode(self, token_ids: list[int]) -> str:
        anchor, text = (
            self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (self.anchor, [*self.anchor, *token_ids])
        )
        if text.startswith(anchor):
            return text[len(anchor) :]
        return self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)

    def spell(self, token_id: int) -> str:
        """The text of an incomplete character: its bytes, escaped, else its spelling in the vocabulary."""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if not token:
            return f"[{token_id}]"  # the vocabulary is padded
        fallback = BYTE_FALLBACK.fullmatch(token)
        if fallback is not None:
            return f"\\x{fallback[1].lower()}"
        if all(character in self.bytes for character in token):
            values = (self.bytes[character] for character in token)
            return "".join(chr(value) if 32 <= value < 127 else f"\\x{value:02x}" for value in values)
        return token


VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    """A token's text for a table, with signs or escapes for invisible characters."""
    inner = "".join(VISIBLE.get(c, c if c.isprintable() else ascii(c)[1:-1]) for c in text)
    stripped = inner.strip(" ")
    before = len(inner) - len(inner.lstrip(" "))
    return "␣" * before + stripped + "␣" * (len(inner) - before - len(stripped))


def running(text: str) -> str:
    """A token's text for a page of consecutive tokens, with its line ends."""
    return "".join("↵\n" if c == "\n" else c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)
