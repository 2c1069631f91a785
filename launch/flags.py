"""Which flags and words a command line may hold; what is told of others before Hydra reads it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from only_values import refuse_path, refuse_typed
from refused_by_hydra import unreadable

from moe.config_from_dict import known_keys
from moe.errors import ConfigError
from moe.right_key import right_key

MULTIRUN_FLAGS = ("--multirun", "-m")
FLAGS_WITH_A_VALUE = (
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn",
    "--config-dir", "-cd",
)  # fmt: skip
_FLAGS_ALONE = (*MULTIRUN_FLAGS, "--run", "-r", "--resolve", "--info", "-i", "--version")
_CFG = ("job", "hydra", "all")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def refuse_flags(schema: type) -> None:
    """Refuse what Hydra would take and we do not, or would answer with a page of usage."""
    arguments = sys.argv[1:]
    is_sweep = any(flag in arguments for flag in MULTIRUN_FLAGS)
    is_value = False
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if is_value:
            is_value = False
            continue
        name, sign, value = argument.partition("=")
        if not name.startswith("-"):
            refuse_typed(argument, is_sweep=is_sweep)
            _refuse_shape(argument, schema)
            continue
        is_value = name in FLAGS_WITH_A_VALUE and not sign
        is_value |= name in ("--info", "-i") and following in _INFO
        value = value if sign else following
        if name == "--experimental-rerun":
            raise ConfigError(
                "--experimental-rerun: it reads a pickle file, which can run code; not allowed. "
                "Give the overrides again: their values are in the run folder's config.json."
            )
        if name in _FLAGS_ALONE and sign:
            raise ConfigError(f"{name}: got {value!r}; it takes no value. Write {name} alone.")
        if name not in (*_FLAGS_ALONE, *FLAGS_WITH_A_VALUE):
            raise ConfigError(_unknown_flag(name, value, schema))
        if name in FLAGS_WITH_A_VALUE:
            _check_flag(name, value, arguments)
        if name == "--resolve" and not {"--cfg", "-c"} & {a.partition("=")[0] for a in arguments}:
            raise ConfigError("--resolve: it goes with --cfg. Write --cfg job --resolve.")


def _unknown_flag(name: str, value: str, schema: type) -> str:
    word = name.lstrip("-").replace("-", "_")
    known = known_keys(schema)
    key = word if word in known else right_key(word, known) or word
    is_value = value and not value.startswith("-") and "=" not in value
    fix = f" Write {key}={value if is_value else 'VALUE'}." if key in known else ""
    return (
        f"{name}: unknown flag. Keys are given without dashes and with an equals sign.{fix} "
        "--help lists flags, groups and keys."
    )


def _check_flag(name: str, value: str, arguments: list[str]) -> None:
    if name in ("--cfg", "-c"):
        if value not in _CFG:
            raise ConfigError(
                f"{name}: got {value!r}; allowed: {', '.join(_CFG)}. Write {name} job."
            )
        return
    if not value or value.startswith("-"):
        raise ConfigError(f"{name}: got it without a value. Write {name} VALUE, or leave it out.")
    if name in ("--config-path", "-cp"):
        refuse_path(name, value)
    if name in ("--config-dir", "-cd") and not Path(value).is_dir():
        raise ConfigError(
            f"--config-dir: {value!r} does not exist or is no folder (working "
            f"directory {Path.cwd()}). Give the folder that has experiment/mine.yaml in it."
        )


def _refuse_shape(argument: str, schema: type) -> None:
    """Refuse a word of which no key can be read; Hydra would name what is left of it."""
    key, sign, value = argument.partition("=")
    if not argument.strip() or (sign and not key.strip("+~ ")):
        raise ConfigError(
            f"command line: got {argument!r}, which has no key; perhaps a variable of your shell "
            "is empty. Give key=value or group=option."
        )
    if "\0" in argument or not re.fullmatch(r"(\+\+?|~)?[\w./@:$-]+", key):
        stripped = f"{key.strip()}={value.strip()}"
        hint = f" Write {stripped}." if sign and re.fullmatch(r"[\w.]+", key.strip()) else ""
        raise ConfigError(
            f"command line: got {argument!r}; a key has letters, digits, points and underscores, "
            f"and the equals sign follows at once.{hint or ' Give key=value or group=option.'}"
        )
    if not sign and not key.startswith("~"):
        raise ConfigError(unreadable(argument, schema))


def flags_last(arguments: list[str]) -> list[str]:
    """Move overrides before the flags: the parser refuses overrides on both sides of a flag."""
    flags, overrides = [], []
    previous = ""
    for argument in arguments:
        is_flag = argument.startswith("-") or previous in FLAGS_WITH_A_VALUE
        is_flag |= previous in ("--info", "-i") and argument in _INFO
        (flags if is_flag else overrides).append(argument)
        previous = argument
    return overrides + flags
