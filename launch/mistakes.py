"""How a mistake is told: one message on stderr, with the key, the value and the fix."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.errors import HydraException
from launchers.rank_exit import is_rank, write_exit
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from refused_by_hydra import explain

from moe.errors import ConfigError, UserError, place_advice

# the machine's disk says no: nothing is wrong in the code, so no traceback
_CANNOT_WRITE = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EINVAL, errno.EISDIR,
    errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


def exit_on_mistake(
    action: Callable[[], None],
    schema: type,
    *,
    name: str,
    writes: str | None,
    on_interrupt: str,
    is_ours: Callable[[], bool],
) -> None:
    """Run action; turn what a user can mend into a message and an exit code.

    is_ours says whether our code had begun when an exception came: before that, whatever is raised
    is about the configuration or the surroundings, and after it a bug, which keeps its traceback.
    """
    try:
        action()
        _flush()
    except UserError as error:
        stop(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        stop(explain(error, schema, name), ConfigError.exit_code)
    except KeyboardInterrupt:
        stop(on_interrupt, 130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        disk = error if isinstance(error, OSError) and error.errno in _CANNOT_WRITE else None
        if disk and disk.filename is None and (writes is None or not is_ours()):
            _stop_at_output(disk)  # no file of ours is open
        if not is_ours():
            stop(explain(error, schema, name), ConfigError.exit_code)
        if disk is None or writes is None:
            raise
        stop(
            f"{writes}: cannot write {disk.filename or 'a file'}: {disk.strerror}. "
            f"{place_advice(disk, writes)} What was saved before is good.",
            UserError.exit_code,
        )


def _flush() -> None:
    """Have what was printed reach the disk now: later, its refusal is nobody's exception."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _stop_at_output(error)


def _stop_at_output(error: OSError) -> NoReturn:
    # what it still holds would be refused again, at the interpreter's end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    stop(
        f"standard output: cannot be written: {error.strerror}. Send it to a place that takes it.",
        UserError.exit_code,
    )


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
    if any(
        typed.lstrip("+~").startswith(f"{key}=")
        for typed in [*hydra.overrides.task, *hydra.overrides.hydra]
    ):
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
