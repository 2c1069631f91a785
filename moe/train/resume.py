"""Which configuration a run goes on with: its own, and what was typed for it on purpose.

config.json is the configuration that the run began with and is not written again; each resume
keeps its own in resumes/. Every difference is said. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe.config import TrainConfig
from moe.errors import CheckpointError, ConfigError
from moe.run_folder import CHECKPOINTS_NAME, step_of_name
from moe.train.atomic_files import replace_file
from moe.train.redact import REDACTED
from moe.train.run_place import CONFIG_NAME, has_checkpoints

RESUMES_NAME = "resumes"
TYPED = "typed"
# what is of each command, and not of the run
_OF_THE_COMMAND = ("launcher", "paths.run_dir", "train.resume", "train.profile")
# another value is another run (moe/train/state.py refuses it), or bends what is left of this one
_IDENTITY = ("seed", "model", "router", "data.seq_len", "train.batch_size", "train.overfit")
_MATHEMATICS = ("optim", "train.steps", "train.precision", "train.init_from", "train.upcycle",
                "parallel.bf16_parameters")  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A key whose value is another than before."""

    key: str
    before: Any
    now: Any

    def shown(self, *, has_steps: bool) -> str:
        """For the user; has_steps: whether the run still has a step to take."""
        how_long = "from here on" if has_steps else "in this command alone: no step is left"
        return f"{self.key}: was {self.before!r}, is {self.now!r} {how_long}"


def configuration_of(run_dir: Path) -> dict[str, Any] | None:
    """The configuration that the run had last, as nested dictionaries; None where there is no run.

    Raises CheckpointError where it cannot be read.
    """
    kept = _kept_resumes(run_dir)
    steps = [
        path for path in (run_dir / CHECKPOINTS_NAME).glob("step_*")
        if step_of_name(path.name) is not None
    ]  # fmt: skip
    places = [*kept[-1:], run_dir / CONFIG_NAME, *(p / CONFIG_NAME for p in sorted(steps)[-1:])]
    for path in places:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            try:
                values = json.loads(path.read_bytes())
                return values["config"] if path in kept else dict(values)
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                if isinstance(error, FileNotFoundError | NotADirectoryError):
                    raise
                raise CheckpointError(
                    f"{path}: cannot be read ({error}), so the settings of this run are not known. "
                    "Restore it from a copy; each checkpoint has one, too."
                ) from None
    return None


def go_on(run_dir: Path, composed: dict[str, Any], *, asked: Mapping[str, str]) -> dict[str, Any]:
    """The configuration of the run in run_dir, with what the command asked for.

    composed is the command's whole configuration; asked says of each key that it names how: TYPED,
    or the preset that sets it, e.g. "experiment=nano". A preset decides nothing about a run that
    is under way: where it would change its mathematics, ConfigError names both ways out. What makes
    a run this run is refused here as it was typed, before other keys that go with it are asked:
    CheckpointError.
    """
    recorded = configuration_of(run_dir)
    if recorded is None:
        return composed
    own, new = flat(recorded), flat(composed)
    follows_name = asked.get("data.name") == TYPED and own.get("data.name") != new["data.name"]
    values: dict[str, Any] = {}
    others: list[str] = []
    for key, value in new.items():
        is_typed = asked.get(key) == TYPED or (key == "paths.data_dir" and follows_name)
        known = key in own and REDACTED not in str(own[key])
        if is_typed and known and _makes_another_run(key, own, value):
            others.append(f"{key}: the run has {own[key]!r}, this command asks for {value!r}")
        if is_typed or not known or _is_below(key, _OF_THE_COMMAND):
            values[key] = value
            continue
        values[key] = own[key]
        decides = has_checkpoints(run_dir) and _is_below(key, (*_IDENTITY, *_MATHEMATICS))
        if key in asked and decides and own[key] != value:
            raise ConfigError(
                f"{key}: {asked[key]} says {value!r}, and the run in {run_dir} has {own[key]!r}. "
                f"Leave {asked[key]} out to go on with the run as it is, or type the value that "
                f"you want: {key}={_typed_value(own[key])} is the run's own."
            )
    if others and has_checkpoints(run_dir):
        raise CheckpointError(
            f"{run_dir} holds another run. {'; '.join(others)}. Leave out what differs to go on "
            "with it, or give another paths.run_dir to start anew."
        )
    return nested(values)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What is another than before, but for what belongs to each command; a new key counts as its
    default."""
    old, new = _as_json(flat(asdict(TrainConfig())) | flat(before)), _as_json(flat(now))
    return [
        Difference(key, old.get(key), value)
        for key, value in new.items()
        if not _is_below(key, _OF_THE_COMMAND) and old.get(key) != value
    ]


def record(
    run_dir: Path, config: dict[str, Any], *, step: int | None, say: Callable[[str], None]
) -> None:
    """Keep the configuration of this start, and say what it changes.

    Where the run begins (step None) it is config.json; else a file of its own,
    resumes/<number>_step_<step>.json, with the time and what changed; of a run without a step left
    the configuration stays as it was.
    """
    path = run_dir / CONFIG_NAME
    if step is None:
        replace_file(path, _json(config))
        return
    before = configuration_of(run_dir) or config
    changed = differences(before, config)
    has_steps = step < config["train"]["steps"]
    for one in changed:
        say(f"note: {one.shown(has_steps=has_steps)}")
    if not path.exists():
        replace_file(path, _json(config))
    content = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "changed": {d.key: {"before": d.before, "now": d.now} for d in changed},
        "config": config if has_steps else before,
    }
    number = len(_kept_resumes(run_dir)) + 1
    replace_file(run_dir / RESUMES_NAME / f"{number:04d}_step_{step:08d}.json", _json(content))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested groups."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        group = made
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = value
    return made


def _makes_another_run(key: str, own: Mapping[str, Any], value: Any) -> bool:
    """Whether this value of a key is another run than the run's own."""
    if key == "parallel.bf16_parameters":  # of a run of automatic precision its state knows
        return bool(value) and own.get("train.precision") == "float32"
    was = own[key]
    # texts: a number as YAML 1.1 does not read it, which from_dict does
    is_same = was == value or str(was) == str(value) or _number(was) == _number(value) is not None
    return _is_below(key, _IDENTITY) and not is_same


def _number(value: Any) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    return None


def _kept_resumes(run_dir: Path) -> list[Path]:
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(run_dir / RESUMES_NAME)
    whole = [name for name in names if re.fullmatch(r"\d{4,}_step_\d{8,}\.json", name)]
    return [run_dir / RESUMES_NAME / name for name in sorted(whole, key=_number_of)]


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode() + b"\n"


def _number_of(name: str) -> int:
    return int(name.partition("_")[0])


def _is_below(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _typed_value(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
