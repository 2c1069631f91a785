"""How a conversation is written for each model of the family: special tokens and text between them.

Published templates (the names of CHAT_TEMPLATE_NAMES), where \\n is a newline and c a content:

phi35       Phi-3.5-mini and Phi-3.5-MoE: <|role|>\\nc<|end|>\\n for each message, an empty system
            message left out; then <|assistant|>\\n, or <|endoftext|> without a generation prompt
phi3        Phi-3-mini since July 2024: the same, but an empty system message is written too
phi3_april  Phi-3-mini until then: <s> first; the user's turn already opens the answer
            (<|user|>\\nc<|end|>\\n<|assistant|>\\n), the answer is c<|end|>\\n, nothing closes the
            text, and system messages are dropped
phi3_medium as phi3_april without <s>
phi3_small  <|endoftext|> first, then as phi3
grin        as phi3 (the repository shows a prompt only; what closes a text is taken from phi3)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe.config import CHAT_TEMPLATE_NAMES
from moe.errors import DataError, nearest

ROLES = ("system", "user", "assistant")
END, END_OF_TEXT, ASSISTANT = "<|end|>", "<|endoftext|>", "<|assistant|>"


class Part(NamedTuple):
    """A special token, or text in which nothing is special."""

    text: str
    is_special: bool


@dataclass(frozen=True)
class _Format:
    opening: str | None = None  # the special token before the first message
    skips_empty_system: bool = False
    answers_at_once: bool = False  # April: a user's turn opens the answer, and nothing closes


_FORMATS = {
    "phi35": _Format(skips_empty_system=True),
    "phi3": _Format(),
    "phi3_april": _Format(opening="<s>", answers_at_once=True),
    "phi3_medium": _Format(answers_at_once=True),
    "phi3_small": _Format(opening=END_OF_TEXT),
    "grin": _Format(),
}


def drops_system(template: str) -> bool:
    """Whether the template leaves system messages out, as the first Phi-3 models did."""
    return _format_of(template).answers_at_once


def chat_parts(
    messages: Sequence[Mapping[str, str]],
    *,
    template: str,
    add_generation_prompt: bool = True,
    continues_answer: bool = False,
) -> list[Part]:
    """The conversation in order, neighbouring texts joined.

    Each message is {"role": system | user | assistant, "content": text}. Special tokens written
    inside a content are text. phi3_april and phi3_medium end the same way with and without
    add_generation_prompt. continues_answer: the last message is the assistant's, after the
    user's, and is left open, to be gone on from. Raises DataError for another template, role or
    content.
    """
    form = _format_of(template)
    if continues_answer:
        role, content = _checked(messages[-1], place=len(messages) - 1)
        assert role == "assistant"
        opened = chat_parts(messages[:-1], template=template)
        return list(_joined([*opened, Part(content, False)]))
    parts: list[Part] = []
    if form.opening is not None:
        parts.append(Part(form.opening, True))
    for place, message in enumerate(messages):
        role, content = _checked(message, place=place)
        if role == "system" and (form.answers_at_once or (form.skips_empty_system and not content)):
            continue
        if form.answers_at_once and role == "assistant":
            parts += [Part(content, False), *_tag(END)]
            continue
        parts += [Part(f"<|{role}|>", True), Part(f"\n{content}", False), *_tag(END)]
        if form.answers_at_once:
            parts += _tag(ASSISTANT)
    if not form.answers_at_once:
        parts += _tag(ASSISTANT) if add_generation_prompt else [Part(END_OF_TEXT, True)]
    return list(_joined(parts))


def chat_text(
    messages: Sequence[Mapping[str, str]], *, template: str, add_generation_prompt: bool = True
) -> str:
    """The conversation as one text, for people to read; special tokens are not marked in it."""
    parts = chat_parts(messages, template=template, add_generation_prompt=add_generation_prompt)
    return "".join(part.text for part in parts)


def _format_of(template: str) -> _Format:
    if template not in _FORMATS:
        raise DataError(
            f"tokenizer.chat_template: got {template!r}; allowed: "
            f"{', '.join(CHAT_TEMPLATE_NAMES)}.{nearest(template, CHAT_TEMPLATE_NAMES)}"
        )
    return _FORMATS[template]


def _checked(message: Mapping[str, str], *, place: int) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str):
        raise DataError(
            f"chat message {place}: got {dict(message)!r}; it must have a role of "
            f"{', '.join(ROLES)} and a content that is text."
        )
    return role, content


def _tag(token: str) -> list[Part]:
    return [Part(token, True), Part("\n", False)]


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    """Join texts that follow each other: a tokenizer must see them as one."""
    text = ""
    for part in parts:
        if not part.is_special:
            text += part.text
            continue
        if text:
            yield Part(text, False)
            text = ""
        yield part
    if text:
        yield Part(text, False)
