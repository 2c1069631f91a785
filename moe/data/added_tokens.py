"""Tokens beside the pieces of a vocabulary: which of them a text may contain, and how it is cut.

A control token (a role, <|end|>, the end of text) comes from a template alone: written inside a
document or a message it stays text. A word that a fine-tune added (<think>, <|tool|>) is a word of
the text: wherever it is written it is its id, and it is read back as it was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moe.data.chat_template import Part


@dataclass(frozen=True)
class AddedToken:
    """A token by its text and id; strips_left, strips_right: it swallows white space there."""

    content: str
    id: int
    is_word: bool = False
    strips_left: bool = False
    strips_right: bool = False


def pattern_of(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """What finds these tokens in a text, the longest first; None where there are none."""
    contents = sorted((token.content for token in tokens), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, contents))) if contents else None


def parts_between(text: str, pattern: re.Pattern[str] | None) -> Iterator[Part]:
    """The text in order: the tokens that the pattern finds, and what is between them."""
    start = 0
    for match in pattern.finditer(text) if pattern else ():
        yield Part(text[start : match.start()], False)
        yield Part(match.group(), True)
        start = match.end()
    yield Part(text[start:], False)
