"""Turn a plain nested dict into configuration dataclasses, refusing unknown keys and types."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from moe.errors import ConfigError
from moe.right_key import did_you_mean, right_key

T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], *, path: str = "") -> T:
    """Build dataclass cls from values; missing keys keep their defaults.

    Raises ConfigError naming the key's full path for unknown keys and wrong types. Nothing is
    evaluated: `_target_` is an unknown key like any other.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'configuration'}: got {values!r}; it must be a group of keys.")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise ConfigError(
                f"{full}: unknown key.{did_you_mean(_right(full, known, path))} "
                f"Known here: {', '.join(sorted(known))}."
            )
        made[key] = _convert(hints[key], value, full)
    return cls(**made)


def known_keys(cls: type, *, prefix: str = "") -> list[str]:
    """Every dotted key of cls and of the dataclasses inside it, groups included."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += known_keys(typing.cast(type, hint), prefix=f"{prefix}{name}.")
    return keys


def type_of(cls: type, key: str) -> Any:
    """The declared type of a dotted key, without an `| None`; None for an unknown key."""
    hint: Any = cls
    for part in key.split("."):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        hint = hints.get(part)
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    is_optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return args[0] if is_optional and args else hint


def _right(full: str, known: set[str], path: str) -> str | None:
    prefix = f"{path}." if path else ""
    return right_key(full, [prefix + name for name in sorted(known)])


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path=path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        return _convert(inner[0], value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: got {value!r}; it must be a list, e.g. {path}=[a,b].")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(
            f"{path}: got a number of {value.bit_length()} bits; at most 63 are used."
        )
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # 1e3 and 1000.0
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        return _float_from_text(value, path)
    if type(value) is not hint:
        raise ConfigError(
            f"{path}: got {_shown(value)} of type {type(value).__name__}; "
            f"it must be {_TYPE_WORDS[hint]}."
        )
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _float_from_text(value: str, path: str) -> float:
    # YAML 1.1 reads 1e-3 as text, so a number written that way arrives here as a string
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{path}: got {value!r}; it must be {_TYPE_WORDS[float]}.") from None


_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}
