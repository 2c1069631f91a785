"""Where the checkpoints of a run lie; without torch, so that a wrong folder is answered at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moe.errors import CheckpointError, ConfigError

CHECKPOINTS_NAME = "checkpoints"
_MANIFEST_NAME = "manifest.json"
_DOCUMENTS_PATTERN = "*.documents.npy"  # the tables of prepared text (moe/data/shards.py)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CONVERT = "python launch/convert.py source={} target=NEW"


@dataclass(frozen=True)
class RunPlace:
    """A folder of checkpoints, or exactly one of them."""

    folder: Path
    is_one_checkpoint: bool


def checkpoint_name(step: int) -> str:
    """The folder name of a step: 100 -> "step_00000100"."""
    return f"step_{step:08d}"


def step_of_name(name: str) -> int | None:
    """The step of a folder name, or None where it is not a checkpoint's name."""
    match = re.fullmatch(r"step_([0-9]{8,18})", name)
    step = int(match[1]) if match else -1
    return step if match and checkpoint_name(step) == name else None


def is_run(folder: Path) -> bool:
    """Whether a folder is for find_run; one of another kind of model is not."""
    if any((folder / name).exists() for name in (CHECKPOINTS_NAME, _MANIFEST_NAME)):
        return True
    return folder.name.startswith("step_") or any(folder.glob("step_*"))


def find_run(run: str, *, key: str = "run") -> RunPlace:
    """Understand `run`: a run folder, its checkpoints folder, or one checkpoint's folder.

    Raises ConfigError or CheckpointError, naming the configuration key, where it is none of them.
    """
    if not run:
        raise ConfigError(
            f"{key}: not given; give the folder of a trained run, or one of its checkpoints, e.g. "
            f"{key}=runs/tiny_moe/2026-01-31_12-00-00."
        )
    folder = Path(run).expanduser()
    if not folder.is_dir():
        if not folder.exists() and _HUB_NAME.fullmatch(run) and not folder.parent.exists():
            raise CheckpointError(
                f"{key}: {run!r} does not exist; if it is a name on a model hub: nothing is "
                f"downloaded here. Download the model's folder, then {_CONVERT.format('FOLDER')}."
            )
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{key}: {run!r} {what} (working directory {Path.cwd()}). Give the folder of a trained "
            f"run, which launch/train.py prints at its end.{_runs_nearby()}"
        )
    if (folder / CHECKPOINTS_NAME).is_dir():
        folder = folder / CHECKPOINTS_NAME
    if (folder / _MANIFEST_NAME).is_file() and any(folder.glob(_DOCUMENTS_PATTERN)):
        raise CheckpointError(
            f"{key}: {run!r} is prepared data, which holds text and no model. Give the folder of "
            f"a run that was trained on it.{_runs_nearby()}"
        )
    if any(folder.glob("step_*")):
        return RunPlace(folder, is_one_checkpoint=False)
    if folder.name.startswith("step_") or (folder / _MANIFEST_NAME).is_file():
        return RunPlace(folder, is_one_checkpoint=True)
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{key}: {run!r} is a Hugging Face folder; convert it first: {_CONVERT.format(run)}, "
            "and give that target."
        )
    raise CheckpointError(
        f"{key}: {run!r} holds no checkpoint; allowed: a run folder with {CHECKPOINTS_NAME}/step_*"
        ", one such step_* folder, or a converted model. Train first, or give another folder."
        f"{_runs_nearby()}"
    )


def _runs_nearby() -> str:
    """The newest runs below ./runs, to copy one from."""
    found = [path.parent for path in Path("runs").glob(f"**/{CHECKPOINTS_NAME}") if path.is_dir()]
    newest = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[:3]
    return f" Here are: {', '.join(map(str, newest))}." if newest else ""
