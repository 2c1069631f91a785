"""How every command starts: Hydra composes, dataclasses check, one message on a mistake.

The only file that imports hydra and omegaconf. Nothing heavy is imported before the configuration
is known to be right, so a misspelt key is answered in about a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config_from_dict import from_dict, known_keys
from moe.errors import ConfigError, UserError, nearest

T = TypeVar("T")
# the machine's disk says no: nothing is wrong in the code, so no traceback
_CANNOT_WRITE = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.ENOSPC, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
}  # fmt: skip
CONF = Path(__file__).resolve().parent.parent / "conf"


def run_command(name: str, schema: type[T], task: Callable[[T], None]) -> None:
    """Run task with the configuration conf/<name>.yaml plus the command line, as a schema object.

    Exits 0 on success; a UserError prints one message on stderr and exits with its code (2, or 3
    where training itself had to stop); Ctrl-C exits 130. Other exceptions are bugs and keep their
    traceback.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand us the exception instead of printing it
    ConfigStore.instance().store(name=f"{name}_defaults", node=_defaults(schema))
    if os.environ.get("RANK", "0") != "0":  # only rank 0 may make folders
        sys.argv.append("hydra.run.dir=.")

    def job(composed: DictConfig) -> None:
        try:
            _exit_on_mistake(lambda: task(_checked(composed, schema)), schema)
        except SystemExit:
            with contextlib.suppress(OSError):  # a folder made for a run that never began
                Path(HydraConfig.get().runtime.output_dir).rmdir()
            raise

    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)
    _exit_on_mistake(main, schema)


def _defaults(schema: type) -> dict[str, Any]:
    """The dataclass defaults as a plain dict, so that the YAML files say only what differs."""
    return dataclasses.asdict(schema())


def _checked(composed: DictConfig, schema: type[T]) -> T:
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    state = HydraConfig.get()
    if state.mode == RunMode.MULTIRUN and "run_dir" in values.get("paths", {}):
        values["paths"]["run_dir"] = state.runtime.output_dir  # each job its own folder
    return from_dict(schema, values)  # type: ignore[arg-type]


def _exit_on_mistake(action: Callable[[], None], schema: type) -> None:
    try:
        action()
    except UserError as error:
        _stop(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        _stop(_explain(error, schema), ConfigError.exit_code)
    except KeyboardInterrupt:
        _stop(
            "interrupted. The same command with the same paths.run_dir goes on from the last save.",
            130,
        )
    except OSError as error:
        if error.errno not in _CANNOT_WRITE and not _is_from_hydra(error):
            raise
        place = error.filename or "a file"
        _stop(
            f"paths.run_dir: cannot write {place}: {error.strerror}. Free space there, or set "
            "paths.run_dir to a folder that you may write. Checkpoints already saved are good.",
            UserError.exit_code,
        )


def _is_from_hydra(error: OSError) -> bool:
    """True where Hydra itself failed to make the run folder, before any of our code ran."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
        if trace.tb_frame.f_code.co_name == "job":
            return False
    return error.filename is not None


def _stop(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _explain(error: Exception, schema: type) -> str:
    """Say a Hydra mistake in our words: the key, what is allowed, the nearest right one."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = sorted(str(o) for o in error.options)
        return (
            f"{group}: got {option!r}, and conf/{group}/{option}.yaml does not exist; "
            f"allowed: {', '.join(options)}.{nearest(option, options)}"
        )
    text = str(error).strip()
    match = re.search(r"Could not override '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and match:
        key, known = match[1], known_keys(schema)
        groups = sorted(p.name for p in CONF.iterdir() if p.is_dir())
        return (
            f"{key}: unknown key.{nearest(key, known + groups)} "
            "All keys and their values: add `--cfg job` to the command."
        )
    first = text.splitlines()[0] if text else type(error).__name__
    return f"configuration: {first}"
