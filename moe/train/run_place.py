"""Which folder may be a run's: a new one, or one that holds a run of ours, and nothing else's.

Everything else is refused before anything is written: a run writes config.json and checkpoints
where it is told to, and would destroy what lies there. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from moe.errors import ConfigError
from moe.run_folder import CHECKPOINTS_NAME, step_of_name
from moe.train.lease import LEASE_NAME, hold

CONFIG_NAME = "config.json"
_KEY = "paths.run_dir"
_ANOTHER = f"Give another {_KEY}: a new folder, or the folder of a run to go on with."
# what launchers, a comparison, the watch, schedulers and shells put there before the run itself
_BEFORE_A_RUN = ("slurm", "comparison.json", "comparison.lock", "faults.jsonl", LEASE_NAME)
# a file that is being replaced, by moe/train/atomic_files.py and lease.py; NFS's own
_HIDDEN_BEFORE_A_RUN = re.compile(r"\..+\.([0-9]+|[0-9a-f]{16})|\.nfs.*|\.DS_Store|\.hydra")
_BEFORE_A_RUN_ENDINGS = (".log", ".out", ".err", ".sh", ".sbatch", ".slurm")
_MANY_NAMES = 1000  # of as many namesakes none was free: something else is wrong


def holds_run(folder: Path) -> bool:
    """Whether a run of ours began here; it may have no checkpoint yet."""
    is_checkpoint = (folder / "manifest.json").exists()  # it has a config.json too
    return has_checkpoints(folder) or (_has_own_config(folder) and not is_checkpoint)


def has_checkpoints(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return (folder / CHECKPOINTS_NAME).is_dir() and _has_steps(folder / CHECKPOINTS_NAME)


def require_run_place(run_dir: str) -> None:
    """Raise ConfigError, naming the folder that is meant where it can be guessed."""
    if not run_dir.strip():
        raise ConfigError(
            f"{_KEY}: got an empty text (an empty variable of the shell?). {_ANOTHER}"
        )
    folder = Path(run_dir)
    is_there = os.path.lexists(folder)
    if is_there and not folder.is_dir():
        raise ConfigError(f"{_KEY}: {run_dir!r} is a file or a broken link. {_ANOTHER}")
    what = _what_else(folder) if is_there else _around(folder)
    if what:
        raise ConfigError(f"{_KEY}: {run_dir!r} {what}")


@contextlib.contextmanager
def taken_place(run_dir: str, *, may_rename: bool) -> Iterator[Path]:
    """Make the folder if need be and hold it for this run; nothing of it stays if it stays empty.

    may_rename: the name was made, not chosen, so where it exists another is taken. Raises
    ConfigError where the folder is not a run's place, or another run holds it.
    """
    folder = Path(run_dir)
    if not (may_rename and folder.is_dir()):  # then it is somebody's, and left alone
        require_run_place(run_dir)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if may_rename:
            folder = new_folder_named(folder)
            made = [folder, *made[1:]]
        folder.mkdir(parents=True, exist_ok=True)
        with hold(folder):
            require_run_place(str(folder))  # nobody else can change the answer from here on
            yield folder
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


def new_folder_named(folder: Path) -> Path:
    """Make a folder of this name that nobody else has made: name, name_2, name_3, ..."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, _MANY_NAMES):
        tried = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        with contextlib.suppress(FileExistsError):
            tried.mkdir()
            return tried
    raise ConfigError(f"{_KEY}: {folder} and {_MANY_NAMES} namesakes exist. {_ANOTHER}")


def _what_else(folder: Path) -> str:
    """What the folder is if it is no run's place, and which folder may be meant; else ""."""
    resolved = folder.resolve()
    is_root = resolved.name == CHECKPOINTS_NAME
    if is_root or step_of_name(resolved.name) is not None:
        run = resolved.parent if is_root else resolved.parent.parent
        if holds_run(run):
            what = "the folder of a run's checkpoints" if is_root else "one checkpoint of a run"
            return f"is {what}. The run is {_KEY}={_shown(run)}: give that to go on with it."
    if holds_run(folder):
        return ""
    around = _around(folder)
    if around:
        return around
    if (folder / "manifest.json").exists():
        return (
            "is a checkpoint, a converted model or prepared data (it has a manifest.json), and a "
            f"run would overwrite it. {_ANOTHER} To start from its weights: train.init_from."
        )
    if _has_steps(folder):
        return f"holds checkpoints (step_*) and is no run's folder. {_ANOTHER}"
    if _has_published_model(folder):
        return (
            "holds a published model, and a run would overwrite its config.json. "
            f"{_ANOTHER} To start from its weights, convert it with launch/convert.py and give "
            "the result as train.init_from."
        )
    other = sorted(name for name in os.listdir(folder) if not _may_come_first(name))
    if other:
        return f"is not empty and holds no run of ours (it has {', '.join(other[:3])}). {_ANOTHER}"
    return ""


def _around(folder: Path) -> str:
    """Which folder of ours a new run would lie in, whose files are checked or deleted; else ""."""
    for outer in folder.resolve().parents:
        is_run = holds_run(outer)
        if is_run or _sealed_kind(outer):
            what = "another run" if is_run else _sealed_kind(outer)
            return f"lies inside {what}, {_shown(outer)}, whose folder is its own. {_ANOTHER}"
    return ""


def _sealed_kind(folder: Path) -> str:
    """Of a folder with a manifest of ours: what it is; other programs have a manifest.json, too."""
    values = _read_json(folder / "manifest.json")
    if {"seal", "splits"} <= values.keys():
        return "prepared data"
    return "a checkpoint or converted model" if "content_sha256" in values else ""


def _shown(run: Path) -> str:
    """Relative to the working directory where it is below it, as people type it."""
    with contextlib.suppress(ValueError):
        return str(run.relative_to(Path.cwd()))
    return str(run)


def _has_steps(folder: Path) -> bool:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return any(step_of_name(e.name.removeprefix(".replaced-")) is not None for e in entries)
    return False


def _has_published_model(folder: Path) -> bool:
    if any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        return True
    values = _read_config(folder)
    return "architectures" in values or "model_type" in values


def _has_own_config(folder: Path) -> bool:
    return {"train", "model", "paths"} <= _read_config(folder).keys()


def _read_config(folder: Path) -> dict[str, object]:
    return _read_json(folder / CONFIG_NAME)


def _read_json(path: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_bytes())
        return values if isinstance(values, dict) else {}
    return {}


def _may_come_first(name: str) -> bool:
    is_ours = name in _BEFORE_A_RUN or _HIDDEN_BEFORE_A_RUN.fullmatch(name) is not None
    return is_ours or name.endswith(_BEFORE_A_RUN_ENDINGS)
