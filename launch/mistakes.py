"""How a mistake is told: one message on stderr, with the key, the value and the fix."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from launchers.rank_exit import is_rank, write_exit
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config_from_dict import known_keys
from moe.errors import ConfigError, UserError, nearest

# the machine's disk says no: nothing is wrong in the code, so no traceback
_CANNOT_WRITE = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
_ALL_KEYS = "All keys and their values: add `--cfg job` to the command."
CONF = Path(__file__).resolve().parent.parent / "conf"


def exit_on_mistake(
    action: Callable[[], None],
    schema: type,
    *,
    writes: str | None,
    on_interrupt: str,
    is_ours: Callable[[], bool],
) -> None:
    """Run action; turn what a user can mend into a message and an exit code.

    is_ours says whether our code had begun when an exception came: before that, whatever Hydra
    raises is about the configuration.
    """
    try:
        action()
    except UserError as error:
        stop(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        stop(_explain(error, schema), ConfigError.exit_code)
    except KeyboardInterrupt:
        stop(on_interrupt, 130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE or writes is None:
            raise
        stop(
            f"{writes}: cannot write {error.filename or 'a file'}: {error.strerror}. Free space "
            f"there, or set {writes} to a place that you may write. What was saved before is good.",
            UserError.exit_code,
        )
    except (ValueError, TypeError, KeyError) as error:
        if is_ours():
            raise
        stop(f"configuration: {error}. {_ALL_KEYS}", ConfigError.exit_code)


def stop(message: str, code: int) -> NoReturn:
    """Say the message and leave; a rank says it to its launcher, which speaks once for all."""
    if is_rank():
        write_exit(code, message)
        sys.exit(code)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def name_the_file(error: ConfigError, hydra: Any) -> ConfigError:
    """Add the YAML file that sets the wrong key, unless it came from the command line."""
    key = str(error).partition(":")[0]
    if any(typed.lstrip("+~").startswith(f"{key}=") for typed in hydra.overrides.task):
        return error
    names = {f"{group}/{option}": group for group, option in hydra.runtime.choices.items()}
    for name, group in {**names, str(hydra.job.config_name): ""}.items():
        for source in hydra.runtime.config_sources:
            path = Path(source.path) / f"{name}.yaml"
            if source.schema != "file" or not path.is_file():
                continue
            values = OmegaConf.to_container(OmegaConf.load(path))
            if any(_holds(values, k) for k in (key, key.removeprefix(f"{group}."))):
                return ConfigError(f"{error} It is set in {path}.")
    return error


def _holds(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _explain(error: Exception, schema: type) -> str:
    """Say a Hydra mistake in our words: the key, what is allowed, the nearest right one."""
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
        what = getattr(error, "problem", None) or error
        return f"{where}: is not YAML ({what}). Indent with spaces, write `key: value`."
    if isinstance(error, MissingConfigException):
        return _missing_file(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    text = str(error).strip()
    match = re.search(r"Could not (?:override|delete)[^']* '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and match:
        return _unknown(match[1], schema)
    if "Ambiguous value for argument" in text:
        override = text.partition("'")[2].partition("'")[0]
        return (
            f"{override.partition('=')[0]}: got several values ({override}); allowed: one, or "
            "several with -m, which makes a run for each. Quote a text that has a comma: "
            f"{override.partition('=')[0]}='\"a,b\"'."
        )
    first = " ".join(text.split()) if text else type(error).__name__
    return f"configuration: {first[:400]} {_ALL_KEYS}"


def _missing_file(error: MissingConfigException) -> str:
    if not error.missing_cfg_file or not error.options:
        first = (str(error).strip() or "a file is missing").splitlines()[0]
        return f"configuration: {first}"
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = sorted(str(o) for o in error.options)
    return (
        f"{group}: got {option!r}, and conf/{group}/{option}.yaml does not exist; allowed: "
        f"{', '.join(options)}.{nearest(option, options)} Your own FOLDER/{group}/{option}.yaml "
        "is found with --config-dir FOLDER."
    )


def _unreadable(error: OverrideParseException) -> str:
    key, sign, value = error.override.partition("=")
    if not sign:
        return (
            f"{error.override}: got it without a value; allowed: key=value or group=option. "
            "Write e.g. model=nano_moe."
        )
    return (
        f"{key}: cannot read the value {value!r}; ( ) [ ] {{ }} , : = and quotes have a meaning. "
        f"Quote it twice, once for the shell: '{key}=\"{value}\"'."
    )


def _unknown(key: str, schema: type) -> str:
    known = known_keys(schema)
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    parent = key.rpartition(".")[0]
    prefix = f"{parent}." if parent in known else ""
    here = sorted(
        k.removeprefix(prefix) for k in known
        if k.startswith(prefix) and "." not in k.removeprefix(prefix)
    )  # fmt: skip
    return (
        f"{key}: unknown key.{nearest(key, [*known, *groups])} "
        f"Known here: {', '.join(here)}. {_ALL_KEYS}"
    )
