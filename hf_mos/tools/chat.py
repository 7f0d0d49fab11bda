"""Renders rows of messages as text, by the tokenizer's own chat template.

A row is a list of messages: `[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .texts import Messages, ToolChat

ASSISTANT = "assistant"


class Chat(NamedTuple):
    """A conversation as the chat template renders it."""

    text: str
    turns: list[tuple[int, int]] | None  # where the assistant's turns begin and end in the text; None: not searched

    def counted_text(self) -> str:
        """The text, or only the assistant's turns if they were searched."""
        return self.text if self.turns is None else "".join(self.text[start:end] for start, end in self.turns)


Text: TypeAlias = str | Chat


def render(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[str | Messages | ToolChat],
    assistant_only: bool,
    source: str = "the data",
    start: int = 0,
) -> list[Text]:
    """The texts of rows: a text as it is, messages as a [`Chat`].

    Args:
        assistant_only: search the assistant's turns, for a loss on them alone.
        source: where the rows are from, and `start` the number of the first, for the error.

    Raises:
        ValueError: the tokenizer has no chat template, the template refuses a row or does not show where a turn
            begins, or the assistant's turns are searched in a text.
    """
    texts: list[Text] = []
    for i, row in enumerate(rows, start):
        try:
            texts.append(render_row(tokenizer, row, assistant_only))
        except (ValueError, TemplateError) as error:
            raise ValueError(f"row {i} of {source}: {error}") from error
    return texts


def render_row(tokenizer: PreTrainedTokenizerBase, row: str | Messages | ToolChat, assistant_only: bool) -> Text:
    if isinstance(row, str):
        if assistant_only:
            raise ValueError("--assistant-only: expected rows of messages, given text")
        return row
    if not tokenizer.chat_template:
        raise ValueError("tokenizer: expected one with a chat template for rows of messages, given one without")
    row, tools = row if isinstance(row, ToolChat) else (row, None)
    messages, tools = without_nulls(row), without_nulls(tools)
    if not assistant_only:
        return Chat(render_text(tokenizer, messages, tools), None)
    template = tokenizer.get_chat_template()
    if "{% generation" in template or "{%- generation" in template:
        special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **special
        )
        (text,), (turns,) = rendered
        return Chat(text, turns)
    return Chat(text := render_text(tokenizer, messages, tools), find_turns(tokenizer, messages, tools, text))


def without_nulls(value: Any) -> Any:
    """The value without keys of no value: Arrow gives each part of a message the keys of all parts."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def beginning(text: Text, length: int) -> Text:
    """At most `length` characters of a text."""
    return text[:length] if isinstance(text, str) else text._replace(text=text.text[:length])


def join(texts: Iterable[Text]) -> str:
    texts = list(texts)
    if any(isinstance(text, Chat) for text in texts):
        raise ValueError("--join-rows: expected rows of text, given messages")
    return "".join(map(str, texts))


def render_text(
    tokenizer: Any, messages: Messages, tools: list[Any] | None, add_generation_prompt: bool = False
) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def find_turns(tokenizer: Any, messages: Messages, tools: list[Any] | None, text: str) -> list[tuple[int, int]]:
    """Where the assistant's turns begin and end in the text, by rendering the messages before and up to each."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = render_text(tokenizer, messages[:i], tools, add_generation_prompt=True) if i else ""
        whole = render_text(tokenizer, messages[: i + 1], tools)
        if not (whole.startswith(before) and text.startswith(whole)):
            raise ValueError(
                "--assistant-only: expected a chat template that renders a turn alike whatever follows it, or that "
                "marks the assistant's turns by {% generation %}, given one that does neither"
            )
        turns.append((len(before), len(whole)))
    return turns
