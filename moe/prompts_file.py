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
from moe.inference_config import JSON_LINES

# their lines are no prompts
_OF_TABLES = (".json", ".csv", ".tsv", ".parquet")
_KEYS = ("prompt", "messages", "prompt_ids")
_RULE = 'messages must be a list of {"role": ' + " | ".join(ROLES) + ', "content": text}'
# roles of other chat formats, for which the templates of this family have nothing
_INSTEAD = {
    "developer": "write it as a system message",
    "tool": "write the result into the user's message",
    "function": "write the result into the user's message",
    "human": "write it as user",
    "gpt": "write it as assistant",
}


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

    @property
    def start(self) -> str:
        """What is shown before the text that follows: a text, or an answer's given beginning."""
        if isinstance(self.given, str):
            return self.given
        if isinstance(self.given, list) and self.given[-1]["role"] == "assistant":
            return self.given[-1]["content"]
        return ""

    @property
    def starts_text(self) -> bool:
        """Whether what follows is a text of its own: an answer from its beginning."""
        return isinstance(self.given, list) and self.given[-1]["role"] == "user"


def read_prompts_file(name: str, *, chat: bool, system: str) -> list[Prompt]:
    """Read every prompt of a UTF-8 file; blank lines hold none.

    In a .jsonl or .ndjson file each line is an object with one of "prompt", "messages" and
    "prompt_ids"; of any other file each line is a text. With chat a text is a user's message;
    system opens each conversation that has no system message. An assistant's message at the end is
    the beginning of an answer, to be gone on from; a content in parts is its texts, a line each.
    Raises ConfigError or DataError naming file and line.
    """
    if name.endswith(_OF_TABLES):
        raise ConfigError(
            f"prompts_file: got {name!r}, whose lines are no prompts; allowed: JSON lines "
            f"({', '.join(JSON_LINES)}), or any other text file with a prompt on each line. "
            'Write one object a line, e.g. {"prompt": "once"}, into a .jsonl file.'
        )
    prompts = []
    for place, line in _lines(name):
        given = _from_json(line, place) if name.endswith(JSON_LINES) else line
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
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: holds half of a surrogate pair, which is not text. Remove it."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON ({error}); write one object a line.") from None
    keys = [key for key in _KEYS if key in value] if isinstance(value, dict) else []
    if len(keys) != 1:
        if isinstance(value, dict) and "conversations" in value and not keys:
            raise DataError(
                f'{place}: has "conversations"; write "messages", and in each "role" (user, '
                'assistant) for "from" and "content" for "value".'
            )
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
    return _conversation(given, place)


def _conversation(given: Any, place: str) -> list[dict[str, str]]:
    _checked(given, isinstance(given, list) and len(given) > 0, place, _RULE)
    messages = [
        _message(value, f"{place}, message {number}") for number, value in enumerate(given, start=1)
    ]
    roles = [message["role"] for message in messages]
    is_answerable = roles[-1] == "user" or roles[-2:] == ["user", "assistant"]
    _checked(
        given, is_answerable and "system" not in roles[1:], place,
        "messages must end with the user's, or with the beginning of an answer to it, and a system "
        "message can only be the first",
    )  # fmt: skip
    return messages


def _message(value: Any, place: str) -> dict[str, str]:
    _checked(value, isinstance(value, dict), place, _RULE)
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        instead = _INSTEAD.get(role) if isinstance(role, str) else None
        rule = f"{_RULE}, as the templates of this family have no other role"
        _checked(role, False, place, f"{rule}; {instead}" if instead else rule)
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        is_text = all(isinstance(text, str) for text in texts)
        _checked(content, is_text, place, f"{_RULE}; of a content in parts, texts alone are read")
        content = "\n".join(text for text in texts if text is not None)
    _checked(content, isinstance(content, str), place, _RULE)
    return {"role": role, "content": content}


def _checked(value: Any, is_right: bool, place: str, rule: str) -> Any:
    if not is_right:
        raise DataError(f"{place}: {rule}; got {_short(value)}.")
    return value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
