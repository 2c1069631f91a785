"""Train every arm of a comparison with every seed; write a table, a figure and a short report.

usage: python launch/compare.py comparison=NAME [key=value ...]

examples:
  python launch/compare.py comparison=routers
  python launch/compare.py comparison=dense_and_sparse jobs=1 paths.runs=/data/compare
  python launch/compare.py comparison=routers seeds=[0] overrides='train.steps=60 model=nano_moe'
  python launch/compare.py comparison=routers report_only=true
Runs are processes of launch/train.py, one thread each, as many at once as there are cores. The
same command goes on where it was stopped; a run that is finished is not made again, also when
another comparison made it. The report, its raw numbers (CSV) and its figure are written to
paths.reports/NAME; report_only=true writes report and figure again from those numbers.
exit codes: 0 done; 1 a run failed; 2 a mistake in the command; 130 Ctrl-C, everything is saved
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from command import run_command
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from moe.compare_config import CompareConfig
from moe.config import TrainConfig
from moe.config_from_dict import from_dict
from moe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from comparison_pool import State

_ROOT = Path(__file__).resolve().parent.parent
_SECONDS_BETWEEN_LINES = 30.0


def compare(config: CompareConfig) -> None:
    """Train what is missing, collect the numbers, write the report."""
    if not config.arms:
        raise ConfigError(
            "comparison: not given; give one of conf/comparison/*.yaml, e.g. comparison=routers."
        )
    folder = Path(config.paths.reports) / config.name
    if not config.report_only:
        _train_and_collect(config, folder)
    from comparison_outputs import write_report

    for line in write_report(config, folder):
        print(line)
    print(f"report: {folder}/report.md")


def _train_and_collect(config: CompareConfig, folder: Path) -> None:
    from comparison_plan import plan
    from comparison_pool import train_all
    from measured_on import measured_on

    runs = plan(config, compose_training)
    fingerprint = _prepared(runs[0].config)
    if any(run.config.paths.data_dir != runs[0].config.paths.data_dir for run in runs):
        raise ConfigError(
            "arms: they read different data (paths.data_dir); allowed: one for all, or their "
            "losses say nothing. Set data.name in the experiment or in overrides."
        )
    jobs = config.jobs or os.cpu_count() or 1
    print(f"{config.name}: {len({r.folder for r in runs})} runs, {jobs} at once", flush=True)
    train_all(
        runs,
        jobs=jobs,
        flags=_own_files(),
        provenance=measured_on(),
        data_fingerprint=fingerprint,
        show=_Line(config.name),
        say=lambda line: print(f"\n{line}", file=sys.stderr, flush=True),
    )
    from comparison_outputs import write_numbers

    write_numbers(runs, folder, common_overrides=config.overrides)


def compose_training(overrides: Sequence[str]) -> TrainConfig:
    """What launch/train.py would make of these overrides."""
    composed = hydra.compose("train", overrides=list(overrides))
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return from_dict(TrainConfig, values)  # type: ignore[arg-type]


def _own_files() -> list[str]:
    """--config-dir as it was given: an arm may use files of that folder."""
    sources = HydraConfig.get().runtime.config_sources
    given = [source.path for source in sources if source.provider == "command-line"]
    return [word for path in given for word in ("--config-dir", path)]


def _prepared(config: TrainConfig) -> str:
    """The fingerprint of the data, which are prepared first if they are not there."""
    from comparison_pool import environment

    from moe.data.manifest import read_manifest

    folder = config.paths.data_dir
    if not Path(folder).exists():
        print(f"preparing {folder}", flush=True)
        overrides = [
            f"data.name={config.data.name}",
            f"data.sources=[{','.join(config.data.sources)}]",
            f"data.text_key={config.data.text_key}",
            f"data.max_bad_lines={config.data.max_bad_lines}",
            f"data.max_bytes={config.data.max_bytes}",
            f"data.validation_fraction={config.data.validation_fraction}",
            f"tokenizer.vocab_size={config.tokenizer.vocab_size}",
            f"paths.data_dir={folder}",
        ]
        command = [sys.executable, str(_ROOT / "launch/prepare_data.py"), *overrides]
        done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise DataError(f"{folder}: cannot be prepared; the lines above say why.")
    return read_manifest(folder, verify=False).fingerprint


class _Line:
    """One line that is written over in a terminal; elsewhere a line now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began, self._first_share, self._last = time.monotonic(), -1.0, -1e9

    def __call__(self, state: State) -> None:
        from moe.train.progress import duration

        if self._first_share < 0:
            self._first_share = state.share
        is_terminal, now = sys.stdout.isatty(), time.monotonic()
        if not is_terminal and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        gained = state.share - self._first_share
        eta = ""
        if gained > 0.01:
            eta = f", eta {duration((now - self._began) * (1 - state.share) / gained)}"
        line = f"{self._name}: {state.done}/{state.total} done{eta}"
        line = "  ".join([line, *state.where])
        if is_terminal:
            width = os.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", flush=True)
        else:
            print(line, flush=True)


def main() -> None:
    """Hydra has to know launch/train.py's configuration too."""
    ConfigStore.instance().store(name="train_defaults", node=dataclasses.asdict(TrainConfig()))
    run_command(
        "compare",
        CompareConfig,
        compare,
        about=__doc__,
        writes="paths.runs",
        literal=("overrides", "paths.runs", "paths.reports"),
        on_interrupt="interrupted; all runs are saved. The same command goes on.",
    )


if __name__ == "__main__":
    main()
