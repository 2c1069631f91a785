"""Which runs a comparison needs: their settings, how long they train, and where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.compare_config import ArmConfig, CompareConfig
from moe.config import PREPARED_KEYS, TrainConfig
from moe.config_from_dict import from_dict
from moe.errors import ConfigError

Compose = Callable[[Sequence[str]], TrainConfig]

# not what is trained: where a run lies and speaks, which seed (a folder of its own), and what was
# decided when the data were prepared (the data's fingerprint is compared instead)
_NOT_IN_KEY = (
    "name",
    "seed",
    "paths",
    "launcher",
    "logging",
    "watch",
    "tokenizer",
    "train.init_from",
    *PREPARED_KEYS,
)


@dataclass(frozen=True)
class PlannedRun:
    """One run of launch/train.py."""

    arm: str
    seed: int  # of the comparison; the run's own is config.seed
    folder: Path
    key: str  # of its settings but for the seed: equal keys are the same run
    config: TrainConfig
    overrides: tuple[str, ...]  # as typed, without where it lies
    starts_from: PlannedRun | None
    flops: float  # of its own steps
    tokens: int  # of its own steps, padding included

    @property
    def total_flops(self) -> float:
        """With those of the run that it starts from."""
        return self.flops + (self.starts_from.total_flops if self.starts_from else 0.0)

    @property
    def total_tokens(self) -> int:
        """With those of the run that it starts from."""
        return self.tokens + (self.starts_from.total_tokens if self.starts_from else 0)

    @property
    def arguments(self) -> list[str]:
        """The command line of launch/train.py."""
        start = [f"train.init_from={_typed(self.starts_from.folder)}"] if self.starts_from else []
        read = [o for o in self.overrides if o.lstrip("+~").partition("=")[0] not in PREPARED_KEYS]
        return [*read, *start, f"paths.run_dir={_typed(self.folder)}"]


def plan(config: CompareConfig, compose: Compose) -> list[PlannedRun]:
    """Every run, those of the first seed first and each after the one that it starts from.

    compose gives what launch/train.py would make of overrides. Raises ConfigError naming the arm.
    """
    runs: dict[tuple[str, int], PlannedRun] = {}
    composed = {arm.name: _composed(config, arm, compose) for arm in config.arms}
    for seed in config.seeds:
        for arm in config.arms:
            try:
                runs[arm.name, seed] = _planned(config, arm, seed, runs, composed[arm.name])
            except ConfigError as error:
                raise ConfigError(f"arm {arm.name}: {error}") from None
    return list(runs.values())


def _composed(config: CompareConfig, arm: ArmConfig, compose: Compose) -> TrainConfig:
    """An arm without its seed; composing takes a tenth of a second, so it is done once."""
    start = [] if arm.starts_from is None else [f"train.init_from={arm.starts_from}"]
    try:
        return compose([*_fixed(config, arm), *start])
    except ConfigError as error:
        raise ConfigError(f"arm {arm.name}: {error}") from None


def _fixed(config: CompareConfig, arm: ArmConfig) -> list[str]:
    return [f"experiment={config.experiment}", *config.common_overrides, *arm.overrides]


def _planned(
    config: CompareConfig,
    arm: ArmConfig,
    seed: int,
    runs: dict[tuple[str, int], PlannedRun],
    composed: TrainConfig,
) -> PlannedRun:
    start = runs[arm.starts_from, seed] if arm.starts_from is not None else None
    steps = composed.train.steps
    if arm.flops_of is not None:
        steps = _steps_of_equal_flops(composed, runs[arm.flops_of, seed], start)
    changes = _timing(composed, steps, config.evaluations) | {"seed": seed + arm.seed_offset}
    key = run_key(
        dataclasses.asdict(_with(composed, changes)), starts_from=start.key if start else None
    )
    name = f"{composed.model.name}_{key}"
    folder = Path(config.paths.runs) / name / f"seed_{changes['seed']}"
    changed = _with(composed, changes | {"paths.run_dir": str(folder)})
    return PlannedRun(
        arm=arm.name,
        seed=seed,
        folder=folder,
        key=key,
        config=changed,
        overrides=(*_fixed(config, arm), *(f"{k}={value}" for k, value in changes.items())),
        starts_from=start,
        flops=steps * flops_per_step(changed),
        tokens=steps * tokens_per_step(changed),
    )


def _with(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Dotted keys changed, and checked again."""
    values = dataclasses.asdict(config)
    for path, value in changes.items():
        *groups, last = path.split(".")
        group = values
        for name in groups:
            group = group[name]
        group[last] = value
    return from_dict(TrainConfig, values)


def tokens_per_step(config: TrainConfig) -> int:
    """Tokens of an optimiser step, the few that pad a window's end included."""
    return config.train.batch_size * config.data.seq_len


def flops_per_step(config: TrainConfig) -> float:
    """Model FLOPs of an optimiser step, forward and backward."""
    from moe.train.throughput import model_flops_per_token  # torch: after the checks of settings

    return tokens_per_step(config) * model_flops_per_token(config.model, config.data.seq_len)


def _steps_of_equal_flops(
    composed: TrainConfig, reference: PlannedRun, start: PlannedRun | None
) -> int:
    """The nearest whole number of steps, at least one."""
    left = reference.total_flops - (start.total_flops if start else 0.0)
    return max(1, round(left / flops_per_step(composed)))


def _timing(composed: TrainConfig, steps: int, evaluations: int) -> dict[str, Any]:
    """What another length needs: warm-up of the same share of the run, and evenly spread
    evaluations, with a save at each."""
    wanted = {"train.steps": steps}
    if steps != composed.train.steps:
        share = composed.optim.warmup_steps / composed.train.steps
        wanted["optim.warmup_steps"] = min(steps, max(1, round(share * steps)))
    every = max(1, steps // evaluations)
    wanted |= {"train.evaluate_every": every, "train.save_every": every}
    known = _flat(dataclasses.asdict(composed))
    return {key: value for key, value in wanted.items() if known[key] != value}


def run_key(values: dict[str, Any], *, starts_from: str | None) -> str:
    """Ten hex digits of all settings that are not defaults and that decide what is trained.

    values are a TrainConfig as plain dictionaries, or a run's config.json: the two give one key,
    and a setting that is added later, at its default, leaves it as it is.
    """
    defaults = _flat(dataclasses.asdict(TrainConfig()))
    flat = _flat(values)
    said = {
        key: value
        for key, value in flat.items()
        if not any(key == out or key.startswith(f"{out}.") for out in _NOT_IN_KEY)
        and value != defaults.get(key)
    }
    said.pop("model.name", None)
    text = json.dumps([said, starts_from], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _typed(path: Path) -> str:
    """A path as a value of Hydra's grammar: quoted, so that it may hold any character."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
