"""Read a file of prompts: one a line, or JSON lines with texts, conversations or token ids.

Without torch, so that a mistake in line 900 is known before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.data.chat_template import ROLES
from moe.errors import ConfigError, DataError

_KEYS = ("prompt", "messages", "prompt_ids")


@dataclass(frozen=True)
class Prompt:
    """What to go on from: a text (str), a conversation (messages), or token ids (tuple)."""

    where: str  # for messages to the user
    given: str | list[dict[str, str]] | tuple[int, ...]

    @property
    def record(self) -> dict[str, Any]:
        """The prompt under its key in JSON lines."""
        kind = {str: "prompt", list: "messages", tuple: "prompt_ids"}[type(self.given)]
        return {kind: self.given}


def read_prompts_file(name: str, *, chat: bool, system: str) -> list[Prompt]:
    """Read every prompt of a UTF-8 file; blank lines hold none.

    In a .jsonl file each line is an object with one of "prompt", "messages" and "prompt_ids"; of
    any other file each line is a text. With chat a text is a user's message; system opens each
    conversation that has no system message. Raises ConfigError or DataError naming file and line.
    """
    prompts = []
    for place, line in _lines(name):
        given = _from_json(line, place) if name.endswith(".jsonl") else line
        prompt = Prompt(place, given)
        is_conversation = chat or isinstance(given, list)
        prompts.append(as_conversation(prompt, system=system) if is_conversation else prompt)
    if not prompts:
        raise DataError(f"prompts_file: {name} holds no prompt; write one a line.")
    return prompts


def as_conversation(prompt: Prompt, *, system: str) -> Prompt:
    """A text becomes a user's message; system goes to the front of what has no system message."""
    if isinstance(prompt.given, tuple):
        raise DataError(
            f"{prompt.where}: prompt_ids with chat=true; they are continued as they stand. Use "
            '"prompt" or "messages", or chat=false.'
        )
    messages = prompt.given
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(prompt.where, messages)


def _lines(name: str) -> Iterator[tuple[str, str]]:
    path = Path(name).expanduser()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"prompts_file: {name!r} cannot be read ({error.strerror}; working directory "
            f"{Path.cwd()}). Give a file with one prompt a line, or a .jsonl file."
        ) from None
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        place = f"{name}, line {number}"
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: byte {error.start + 1} is not UTF-8; save the file as UTF-8."
            ) from None
        if text.strip():
            yield place, text


def _from_json(line: str, place: str) -> str | list[dict[str, str]] | tuple[int, ...]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON ({error}); write one object a line.") from None
    keys = [key for key in _KEYS if key in value] if isinstance(value, dict) else []
    if len(keys) != 1:
        raise DataError(
            f"{place}: got {_short(value)}; it must be an object with just one of "
            f'{", ".join(_KEYS)}, e.g. {{"prompt": "Hello"}}.'
        )
    given = value[keys[0]]
    if keys[0] == "prompt":
        return _checked(given, isinstance(given, str), place, "prompt must be text")
    if keys[0] == "prompt_ids":
        is_list = isinstance(given, list) and all(type(token) is int for token in given)
        return tuple(_checked(given, is_list, place, "prompt_ids must be a list of token ids"))
    is_list = isinstance(given, list) and len(given) > 0 and all(map(_is_message, given))
    _checked(
        given, is_list, place,
        'messages must be a list of {"role": ' + " | ".join(ROLES) + ', "content": text}',
    )  # fmt: skip
    roles = [message["role"] for message in given]
    is_answerable = roles[-1] == "user" and "system" not in roles[1:]
    _checked(
        given, is_answerable, place,
        "messages must end with the user's, and a system message can only be the first",
    )  # fmt: skip
    return [{"role": message["role"], "content": message["content"]} for message in given]


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ROLES
        and isinstance(value.get("content"), str)
    )


def _checked(value: Any, is_right: bool, place: str, rule: str) -> Any:
    if not is_right:
        raise DataError(f"{place}: {rule}; got {_short(value)}.")
    return value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
