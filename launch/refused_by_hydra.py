"""What a refusal of Hydra means in our words: the key, the value, what is allowed, the fix."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from commands import chosen_groups, takers
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from moe.config_from_dict import known_keys, type_of
from moe.errors import nearest
from moe.right_key import did_you_mean, named, right_key

CONF = Path(__file__).resolve().parent.parent / "conf"
_ALL_KEYS = "All keys and their values: add `--cfg job` to the command."


def explain(error: Exception, schema: type, name: str) -> str:
    """The message for what Hydra raised while it composed conf/<name>.yaml."""
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
        what = getattr(error, "problem", None) or error
        return f"{where}: is not YAML ({what}). Indent with spaces, write `key: value`."
    if isinstance(error, MissingConfigException):
        return _missing_file(error)
    if isinstance(error, OverrideParseException):
        return unreadable(error.override, schema)
    if isinstance(error, RecursionError):
        return (
            "configuration: a file's defaults list names the file itself, directly or through "
            "another. Take that entry out of your file."
        )
    if isinstance(error, UnicodeDecodeError):
        return f"{_not_utf8()}: is not UTF-8 ({error.reason}). Save it as UTF-8."
    if isinstance(error, OSError):
        return (
            f"configuration: cannot use {error.filename or 'a file'}: {error.strerror}."
            f"{_typed_of_hydra()}"
        )
    text = " ".join(str(error).split())
    match = re.search(r"Could not (?:override|delete)[^']* '([^']+)'", text)
    if isinstance(error, HydraException) and match:
        return unknown(match[1], schema, name)
    return _by_words(error, text, schema)


def unknown(key: str, schema: type, name: str) -> str:
    """The message for a key that this command does not have: the right one, or who has it."""
    known, groups = known_keys(schema), [*chosen_groups(name)]
    group, at, place = key.partition("@")
    if at and group in groups:
        return f"{key}: a group has one place here. Write {group}=OPTION, without @{place}."
    found = key if key in groups else named(key, known)
    others = [] if found else [f"launch/{other}.py" for other in takers(key)]
    if others:
        return (
            f"{key}: launch/{name}.py has no such key; it is one of {', '.join(others)}. "
            "Give it there, or leave it out."
        )
    parent = key.rpartition(".")[0]
    if parent in known and not any(k.startswith(f"{parent}.") for k in known):
        return f"{key}: unknown key. {parent} is a value, not a group: write {parent}=VALUE."
    prefix = f"{parent}." if parent in known else ""
    here = sorted(
        k.removeprefix(prefix) for k in [*known, *(() if prefix else groups)]
        if k.startswith(prefix) and "." not in k.removeprefix(prefix)
    )  # fmt: skip
    found = found or right_key(key, known, words=groups)
    return (
        f"{key}: unknown key.{did_you_mean(found)} Known here: "
        f"{', '.join(dict.fromkeys(here))}. {_ALL_KEYS}"
    )


def unreadable(override: str, schema: type) -> str:
    """The message for a value that Hydra's grammar refuses, with what to type in its place."""
    key, sign, value = override.partition("=")
    if not sign:
        return (
            f"{override}: got it without a value; allowed: key=value or group=option. "
            "Write e.g. model=nano_moe."
        )
    hint = type_of(schema, key.lstrip("+~"))
    if hint in (int, float, bool):
        kind, example = _EXAMPLES[hint]
        return f"{key}: cannot read the value {value!r}; it must be {kind}, e.g. {key}={example}."
    if "${" in value:
        return (
            f"{key}: cannot read the value {value!r}: ${{...}} refers to another key, e.g. "
            f"'{key}=${{name}}'. As text, write the dollar as \\$."
        )
    odd = [letter for letter in dict.fromkeys(value) if not _is_readable(f"k=a{letter}b")]
    named_ = ", ".join("a line break" if c == "\n" else repr(c) for c in odd[:5])
    reason = f"{named_} must be quoted" if odd else "its signs have a meaning"
    right = next((o for o in _quoted(key, value, hint) if _is_readable(o)), None)
    fix = f" Write {shlex.quote(right)}." if right else " Give a text without them."
    return f"{key}: cannot read the value {value!r}: {reason}, once more for the shell.{fix}"


_EXAMPLES: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "4"),
    float: ("a number", "0.5"),
    bool: ("true or false", "true"),
}


def _quoted(key: str, value: str, hint: Any) -> Iterator[str]:
    inner = value.strip()
    if typing.get_origin(hint) is tuple:
        items = [item.strip().strip("\"'") for item in inner.strip("[]").split(",")]
        yield f"{key}=[{','.join(map(_quote, filter(None, items)))}]"
    yield f"{key}={_quote(value)}"


def _quote(text: str) -> str:
    escaped = re.sub(r'(\\*)"', lambda found: found[1] * 2 + '\\"', text)
    return f'"{escaped}"'


def _is_readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _missing_file(error: MissingConfigException) -> str:
    if not error.missing_cfg_file or not error.options:
        first = (str(error).strip() or "a file is missing").splitlines()[0]
        return f"configuration: {first}"
    missing, options = str(error.missing_cfg_file), sorted(str(o) for o in error.options)
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    group = next((g for g in groups if missing.startswith(f"{g}/")), missing.rpartition("/")[0])
    option = missing.removeprefix(f"{group}/")
    stem = Path(option).name.removesuffix(".yaml")
    is_path = "/" in option or option.endswith(".yaml")
    what = "it is no path" if is_path else f"conf/{group}/{option}.yaml does not exist"
    return (
        f"{group}: got {option!r}, and {what}; allowed: {', '.join(options)}."
        f"{nearest(stem, options)} Your own file is FOLDER/{group}/{stem or 'mine'}.yaml with "
        f"--config-dir FOLDER {group}={stem or 'mine'}."
    )


def _not_utf8() -> str:
    arguments = sys.argv[1:]
    given = [b for a, b in itertools.pairwise(arguments) if a in _DIR_FLAGS]
    given += [a.partition("=")[2] for a in arguments if a.partition("=")[0] in _DIR_FLAGS]
    for folder in given:
        for path in sorted(Path(folder).rglob("*.yaml")):
            try:
                path.read_bytes().decode()
            except UnicodeDecodeError:
                return str(path)
            except OSError:
                continue
    return "a configuration file"


_DIR_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")


def _by_words(error: Exception, text: str, schema: type) -> str:
    """Hydra's own sentence, put right: it tells its mistakes apart by words only."""
    several = re.search(
        r"Ambiguous value for argument '([^']*)'|Sweep parameters '(.*?)' req", text
    )
    if several:
        override = several[1] or several[2]
        key = override.partition("=")[0]
        quote = f" Quote a text that has a comma: {key}='\"a,b\"'."
        is_text = type_of(schema, key.lstrip("+~")) in (str, tuple[str, ...])
        return (
            f"{key}: got several values ({override}); allowed: one, or several with -m, which "
            f"makes a run for each.{quote if is_text else ''}"
        )
    is_there = re.search(r"Could not append to config.*already at '([^']+)'", text)
    if is_there:
        return f"{is_there[1]}: is there already. Leave out the +: {is_there[1]}=VALUE."
    twice = re.search(r"Multiple values for (\S+?)\. .*'override [^:]+: ([^']+)'", text)
    if twice:
        return f"{twice[1]}: is chosen already. Leave out the +: {twice[1]}={twice[2]}."
    if "Config group override must be" in text:
        for argument in sys.argv[1:]:
            key, _, value = argument.lstrip("+~").partition("=")
            options = sorted(path.stem for path in (CONF / key).glob("*.yaml")) if key else []
            if options and value not in options:
                return f"{key}: got {value!r}; it is a group, allowed: {', '.join(options)}."
    merging = re.search(r"Error merging override (\S+?)=(.*)", text)
    if merging:
        cause = " ".join(str(error.__cause__ or "it does not fit").split())
        cause = cause.partition(" full_key:")[0].rstrip(".")
        key = merging[1].lstrip("+~")
        return f"{key}: got {merging[2]!r}: {cause}. Give another value, or leave it out."
    full_key = error.full_key if isinstance(error, OmegaConfBaseException) else None
    text = text.partition(" full_key:")[0]
    if full_key:
        text = re.sub(r'^\w+ raised while resolving interpolation: "?(.*?)"?$', r"\1", text)
        text = text.rstrip(".")
        return f"{full_key}: {text[:300]}. {_ALL_KEYS}"
    is_known = text and isinstance(error, (HydraException, OmegaConfBaseException, ValueError))
    first = text[:400] if is_known else f"Hydra stopped ({type(error).__name__}: {text[:200]})"
    return f"configuration: {first.rstrip('.')}.{_typed_of_hydra()} {_ALL_KEYS}"


def _typed_of_hydra() -> str:
    typed = [a for a in sys.argv[1:] if a.lstrip("+~").startswith("hydra") or a.startswith("-")]
    return f" Of what you typed, this concerns Hydra itself: {' '.join(typed)}." if typed else ""
