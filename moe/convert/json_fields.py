"""Reads a JSON object from a file, and typed values from it; a wrong one is named."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import ConfigError

# a real config.json has a few thousand bytes
_MOST_BYTES = 4 * 2**20
# beyond what any tensor's size can be; with it every product of sizes stays small to print
MOST = 2**31 - 1
_FIX = "Correct it in the file, or take the model's own file again."


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; ConfigError for anything else.

    Refused: a missing or too large file, text that is not UTF-8 or not JSON, a key that stands
    twice in one object, and a value that is not an object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{path}: cannot be read ({reason}). Give a config.json, or the "
            "folder of a published model that has one."
        ) from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(
            f"{path}: has more than {_MOST_BYTES:,} bytes; a config.json has a few thousand. "
            "Give the config.json itself, not a file of weights."
        )
    try:
        values = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8; JSON is text. {_FIX}"
        ) from None
    except _Repeated as error:
        raise ConfigError(
            f"{path}: {shown(error.key)}: stands twice in one object, so its value is not known; "
            "allowed: once. Remove the wrong one."
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply for a config.json. {_FIX}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}). {_FIX}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: got {shown(values)}; a config.json holds one JSON object, "
            f'e.g. {{"model_type": "phi3", ...}}. {_FIX}'
        )
    return values


def shown(value: Any) -> str:
    """Return the value as a message shows it: JSON words, at most 60 characters."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, int) and value.bit_length() > 190:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, dict)):
        what = "a list" if isinstance(value, list) else "an object"
        return f"{what} of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Fields:
    """The values of one JSON object, asked for by key and type; `where` names it in messages."""

    values: dict[str, Any]
    where: str

    def is_given(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def whole(self, key: str, default: int, *, least: int = 1, most: int = MOST) -> int:
        """Return a whole number from least to most; the default where the key is missing."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.mistake(key, f"a whole number from {least:,} to {most:,}")
        return value

    def whole_or_none(self, key: str, *, least: int = 1, most: int = MOST) -> int | None:
        """The same, or None where the key is missing or null."""
        return self.whole(key, least, least=least, most=most) if self.is_given(key) else None

    def number(self, key: str, default: float, *, least: float | None = None) -> float:
        """Return a finite number above 0, or of at least `least` where that is given."""
        value = self.values.get(key, default)
        allowed = f"a number of at least {least:g}" if least is not None else "a number above 0"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.mistake(key, allowed)
        if isinstance(value, int) and value.bit_length() > 63:
            raise self.mistake(key, f"{allowed}, below 2**63")
        if not math.isfinite(value) or (value <= 0 if least is None else value < least):
            raise self.mistake(key, allowed)
        return float(value)

    def fraction(self, key: str, default: float) -> float:
        """Return a number in [0, 1)."""
        value = self.number(key, default, least=0.0)
        if value >= 1.0:
            raise self.mistake(key, "a number of at least 0 and below 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.mistake(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.mistake(key, "a text")
        return value

    def numbers(self, key: str, *, length: int, why: str) -> tuple[float, ...]:
        """Return a list of so many numbers above 0; `why` says where the length comes from."""
        value = self.values.get(key)
        allowed = f"a list of {length} numbers above 0 ({why})"
        if not isinstance(value, list) or len(value) != length:
            raise self.mistake(key, allowed)
        entries = Fields({f"{key}[{i}]": v for i, v in enumerate(value)}, self.where)
        return tuple(entries.number(name, 1.0) for name in entries.values)

    def ids(self, key: str, *, vocab_size: int) -> tuple[int, ...]:
        """Return a list of token ids, sorted, each once."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) > vocab_size:
            raise self.mistake(key, f"a list of at most {vocab_size:,} token ids")
        entries = Fields({f"{key}[{i}]": v for i, v in enumerate(value)}, self.where)
        most = vocab_size - 1
        return tuple(sorted({entries.whole(k, 0, least=0, most=most) for k in entries.values}))

    def group(self, key: str) -> Fields | None:
        """Return the object under the key, or None where it is missing, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.mistake(key, "null or an object of keys")
        return Fields(value, f"{self.where}: {key}")

    def mistake(self, key: str, allowed: str, *, fix: str = _FIX) -> ConfigError:
        """Return the error for this key: file, key, value, what is allowed, what to do."""
        got = shown(self.values[key]) if key in self.values else "nothing, the key is missing"
        return ConfigError(f"{self.where}: {key}: got {got}; allowed: {allowed}. {fix}")


class _Repeated(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _Repeated(key)
        values[key] = value
    return values
