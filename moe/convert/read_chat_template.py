"""Which template of the family the chat template of a published tokenizer_config.json is.

A published text is a Jinja program; it is never run. It is taken apart into what it writes before,
inside and after its loop over the messages, so that spacing, quotes, brackets, the cutting of
strings and the order of the roles make no difference, and compared with the known ones.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from moe.convert.chat_template_text import TEXTS

_DEFAULTS = {"phi3": "phi3", "phimoe": "phi35", "phi3small": "phi3_small"}
_LONGEST = 4_000  # characters; the known texts have 300 to 500
_TAG = re.compile(r"\{%[-+]?(.*?)([-+]?)%\}|\{\{[-+]?(.*?)([-+]?)\}\}|\{#.*?([-+]?)#\}", re.DOTALL)
_STRING_OR_REST = re.compile(r"'([^']*)'|\"([^\"]*)\"|([^'\"]+)")
_IGNORED_BLOCKS = ("generation", "endgeneration")  # marks for training; they write nothing


class RecognisedTemplate(NamedTuple):
    """A name of CHAT_TEMPLATE_NAMES, and what the user should know about it, if anything."""

    name: str
    note: str | None


class _Item(NamedTuple):
    kind: str  # "text", "value" (an expression that is written) or "block"
    content: str


class _Structure(NamedTuple):
    before: tuple[_Item, ...]
    branches: frozenset[tuple[str, tuple[_Item, ...]]]  # (condition, what is written) in the loop
    after: tuple[_Item, ...]


def read_chat_template(tokenizer_config: dict[str, Any], *, family: str) -> str:
    """The name of the template in a tokenizer_config.json; an unknown one gives the family's."""
    return recognise_chat_template(tokenizer_config, family=family).name


def recognise_chat_template(tokenizer_config: dict[str, Any], *, family: str) -> RecognisedTemplate:
    """The name, with a note where the text is missing or is not one of this family.

    family is "phi3", "phimoe" or "phi3small". GRIN's conversations are phi3's, and are called so.
    """
    text, default = _text_of(tokenizer_config.get("chat_template")), _DEFAULTS[family]
    what = "has no chat template"
    if text is not None:
        found = _structure(_items(text)) if len(text) <= _LONGEST else None
        for name, known in TEXTS.items():
            if found is not None and found == _structure(_items(known)):
                return RecognisedTemplate(name, None)
        what = "has a chat template that is not one of this family"
    return RecognisedTemplate(
        default,
        f"tokenizer_config.json {what}; {default} is used. Set tokenizer.chat_template where "
        "another is right.",
    )


def _text_of(value: Any) -> str | None:
    """The text itself, or the one named default of a list."""
    if isinstance(value, list):
        named = [e for e in value if isinstance(e, dict) and e.get("name") == "default"]
        value = named[0].get("template") if named else None
    return value if isinstance(value, str) and value.strip() else None


def _items(text: str) -> list[_Item]:
    """What the text holds in order, neighbouring constant texts joined."""
    found: list[_Item] = []
    place, is_after_block, strips = 0, False, False
    for tag in _TAG.finditer(text):
        literal = _literal(
            text[place : tag.start()], tag.group(), is_after_block=is_after_block, strips=strips
        )
        found.append(_Item("text", literal))
        block, expression = tag.group(1), tag.group(3)
        if expression is not None:
            found += _written(expression)
        elif block is not None and block.strip() not in _IGNORED_BLOCKS:
            found.append(_Item("block", _normal(block)))
        is_after_block = expression is None
        strips = "-" in (tag.group(2), tag.group(4), tag.group(5))
        place = tag.end()
    found.append(_Item("text", _literal(text[place:], "", is_after_block=is_after_block,
                                        strips=strips)))  # fmt: skip
    return _joined(found)


def _literal(raw: str, next_tag: str, *, is_after_block: bool, strips: bool) -> str:
    """Text between tags as transformers' Jinja writes it (trim_blocks and lstrip_blocks are on)."""
    text = raw.lstrip() if strips else raw
    if is_after_block and not strips:
        text = text.removeprefix("\n")
    if next_tag[2:3] == "-":
        return text.rstrip()
    if next_tag[:2] in ("{%", "{#") and "\n" in raw:
        indentation = len(text) - len(text.rstrip(" \t"))
        before = text[: len(text) - indentation]
        if before.endswith("\n") or not before:
            return before
    return text


def _written(expression: str) -> list[_Item]:
    """The parts of 'a' + b + 'c': constant texts, and values in one spelling."""
    items, rest = [], ""
    for match in _STRING_OR_REST.finditer(_with_one_spelling(expression)):
        string = match.group(1) if match.group(1) is not None else match.group(2)
        # a key such as message['role'] is no text
        if string is None or rest.rstrip().endswith("["):
            rest += match.group() if string is None else f"'{string}'"
            continue
        items += [*_values(rest), _Item("text", string.replace("\\n", "\n"))]
        rest = ""
    return [*items, *_values(rest)]


def _values(expression: str) -> list[_Item]:
    parts = (part.strip() for part in re.split(r"[+~]", expression))
    return [_Item("value", re.sub(r"\s+", "", part)) for part in parts if part]


def _normal(block: str) -> str:
    """A block or condition in one spelling, without brackets around the whole."""
    text = re.sub(r"\s+", " ", _with_one_spelling(block).replace('"', "'")).strip()
    text = re.sub(r"\s*(==|!=)\s*", " == ", text) if "!=" not in text else text
    keyword, _, condition = text.partition(" ")
    if keyword in ("if", "elif"):
        inner = condition[1:-1]
        if condition[:1] == "(" and condition[-1:] == ")" and "(" not in inner:
            condition = inner.strip()
    return f"{keyword} {condition}".strip()


def _with_one_spelling(text: str) -> str:
    text = re.sub(r"\bmessage\.(role|content)\b", r"message['\1']", text)
    return re.sub(r"\bmessage\s*\[\s*['\"](role|content)['\"]\s*\]", r"message['\1']", text)


def _joined(items: list[_Item]) -> list[_Item]:
    joined: list[_Item] = []
    for item in items:
        if item.kind == "text" and not item.content:
            continue
        if item.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = _Item("text", joined[-1].content + item.content)
        else:
            joined.append(item)
    return joined


def _structure(items: list[_Item]) -> _Structure | None:
    """None where the text is not one loop over the messages, its branches not nested."""
    loop, end = _Item("block", "for message in messages"), _Item("block", "endfor")
    if items.count(loop) != 1 or items.count(end) != 1 or items.index(loop) > items.index(end):
        return None
    start, stop = items.index(loop), items.index(end)
    branches = _branches(items[start + 1 : stop])
    if branches is None:
        return None
    return _Structure(tuple(items[:start]), branches, tuple(items[stop + 1 :]))


def _branches(body: list[_Item]) -> frozenset[tuple[str, tuple[_Item, ...]]] | None:
    blocks = [item.content for item in body if item.kind == "block"]
    if not blocks:
        return frozenset({("", tuple(body))})
    keywords = [block.partition(" ")[0] for block in blocks]
    is_one_choice = (
        keywords[0] == "if" and keywords[-1] == "endif" and set(keywords[1:-1]) <= {"elif"}
    )
    if not is_one_choice or body[0].kind != "block" or body[-1].kind != "block":
        return None
    branches: dict[str, list[_Item]] = {}
    condition = ""
    for item in body[:-1]:
        if item.kind == "block":
            condition = item.content.partition(" ")[2]
            if condition in branches:
                return None
            branches[condition] = []
        else:
            branches[condition].append(item)
    return frozenset((condition, tuple(written)) for condition, written in branches.items())
