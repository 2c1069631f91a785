"""Train a model on prepared text; the run folder holds all that comes of it.

usage: python launch/train.py [experiment=NAME] [group=option ...] [key=value ...] [--dry-run]

examples:
  python launch/train.py experiment=nano
  python launch/train.py model=tiny_dense optim.lr=1e-3 train.steps=500 paths.run_dir=runs/dense
  python launch/train.py -m experiment=nano seed=0,1,2
  python launch/train.py launcher=torchrun launcher.processes_per_node=8
  python launch/train.py launcher=slurm launcher.num_nodes=2 launcher.processes_per_node=8
The same command with the same paths.run_dir goes on from its newest checkpoint.
--dry-run prints what would be started, and what it needs, and starts nothing.
SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU and Ctrl-C save after the step; a second Ctrl-C ends at
once. A pipe or terminal that goes away takes the console with it and nothing else.
exit codes: 0 done; 2 a mistake in the command; 3 training stopped itself; 70 a rank died or hung;
75 saved after a signal, the same command goes on; 130 Ctrl-C
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from command import arguments_of_this_run, run_command
from launchers.job import Job, without_launcher
from launchers.rank_exit import FAILED, as_rank, is_rank
from run_figures import draw_figures
from standard_streams import keep_standard_streams
from tables import load_line, validation_table
from typed import asked_keys, is_typed, refuse_other_data, typed_keys

from moe.config import TrainConfig
from moe.errors import ConfigError, DataError, UserError, nearest
from moe.train.interrupted import telling_what_is_saved
from moe.train.lease import refuse_if_held
from moe.train.resume import TYPED
from moe.train.run_place import holds_run, new_folder_named, require_run_place

_DRY_RUN = "--dry-run"
_Log = Callable[[Path], list[dict[str, Any]]]
_Draw = Callable[[Path], dict[str, Path]]


def train(config: TrainConfig) -> None:
    """Train here as one rank, or start the launcher that starts the ranks."""
    if config.launcher.name == "local" or is_rank():
        train_here(config)
        return
    from launchers.start import check_launch, start

    job = Job(config, without_launcher(arguments_of_this_run()))
    check_launch(job)
    _refuse_place(config)
    _refuse_missing_data(config)
    with (
        _own_folder(job) as owned,
        telling_what_is_saved(Path(owned.config.paths.run_dir)),
    ):
        code = start(owned)
    if code != 0:
        sys.exit(code)


def train_here(config: TrainConfig) -> None:
    """Train, then show the numbers, a sample and pictures of the run."""
    from moe.parallel.launcher import read_launch

    config.check_processes(read_launch().world_size)
    _refuse_place(config)
    _refuse_missing_data(config)
    from moe.train.metrics import METRICS_FILE, read_metrics
    from moe.train.run import run

    @functools.cache  # a long run's log takes a minute to read
    def log(run_dir: Path) -> list[dict[str, Any]]:
        return read_metrics(run_dir / METRICS_FILE)

    @functools.cache  # W&B and the run folder have the same ones
    def draw(run_dir: Path) -> dict[str, Path]:
        return draw_figures(run_dir, metrics=log(run_dir), title=config.name)

    summary = run(
        config,
        say=lambda line: print(line, flush=True),
        draw=draw,
        may_rename=not is_typed("paths.run_dir"),
    )
    if not summary.is_first:
        return
    with telling_what_is_saved(summary.run_dir):
        _show(summary.run_dir, summary.sample, log, draw)


@contextlib.contextmanager
def _own_folder(job: Job) -> Iterator[Job]:
    """A folder that nobody else has, where its name was not chosen: the ranks are told it."""
    if is_typed("paths.run_dir"):
        yield job
        return
    folder = new_folder_named(Path(job.config.paths.run_dir))
    paths = dataclasses.replace(job.config.paths, run_dir=str(folder))
    try:
        yield dataclasses.replace(job, config=dataclasses.replace(job.config, paths=paths))
    finally:
        for path in (folder, *folder.parents[:2]):
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


def _show(run_dir: Path, sample: str | None, log: _Log, draw: _Draw) -> None:
    pictures = draw(run_dir)
    if sample:
        print(f"\nsample:\n{sample}\n")
    metrics = log(run_dir)
    validations = [record for record in metrics if record.get("kind") == "validation"]
    for line in validation_table(validations[-1]) if validations else []:
        print(line)
    for line in load_line(metrics):
        print(line)
    for picture in pictures.values():
        print(f"picture: {picture}")
    print(f"run folder: {run_dir}")


def _refuse_place(config: TrainConfig) -> None:
    """Answer before torch is imported; the run itself asks again when it takes the folder."""
    require_run_place(config.paths.run_dir)
    if is_typed("paths.run_dir"):
        refuse_if_held(Path(config.paths.run_dir))


def _refuse_missing_data(config: TrainConfig) -> None:
    """Answer the most common mistake before torch is imported, which takes seconds."""
    from moe.data.manifest import read_manifest

    try:
        manifest = read_manifest(config.paths.data_dir, verify=False)
    except DataError as error:
        run_dir = Path(config.paths.run_dir)
        if is_typed("paths.run_dir") and holds_run(run_dir):
            raise _not_found_from_here(config, error) from None
        # nothing but a run to go on with was asked for
        if list(typed_keys()) != ["paths.run_dir"]:
            raise
        raise ConfigError(
            f"paths.run_dir: no run is in {str(run_dir)!r} (working directory {Path.cwd()}) to go "
            f"on with.{nearest(str(run_dir), _runs_near(run_dir))} Nor can one begin there: {error}"
        ) from None
    refuse_other_data(config, manifest)


def _not_found_from_here(config: TrainConfig, error: DataError) -> UserError:
    """The error, or why the data of a run that began in another directory are not found."""
    from moe.data.manifest import MANIFEST_NAME

    data_dir, run_dir = Path(config.paths.data_dir), Path(config.paths.run_dir)
    is_chosen = TYPED in map(asked_keys().get, ("paths.data_dir", "data.name"))
    if is_chosen or data_dir.is_absolute() or data_dir.exists():
        return error
    # a run that was moved with its data has them beside itself, wherever both are now
    found = [parent / data_dir for parent in run_dir.resolve().parents
             if (parent / data_dir / MANIFEST_NAME).is_file()]  # fmt: skip
    fix = f"Start there, or give paths.data_dir={found[0] if found else 'FOLDER'}"
    return DataError(
        f"paths.data_dir: the run in {run_dir} reads {str(data_dir)!r}, which was typed in the "
        f"directory where it began, and {Path.cwd()} has no such folder. {fix}."
    )


def _runs_near(run_dir: Path) -> list[str]:
    """The runs beside this folder, or where runs lie by themselves, as they would be typed."""
    patterns = ("runs/*", "runs/*/*", f"{glob.escape(str(run_dir.parent))}/*")
    return sorted({found for pattern in patterns for found in glob.iglob(pattern)
                   if holds_run(Path(found))})  # fmt: skip


def dry_run(config: TrainConfig) -> None:
    """Print what train would start, and what it needs."""
    from launchers.start import check_launch, describe

    job = Job(config, without_launcher(arguments_of_this_run()))
    check_launch(job)
    for line in describe(job):
        print(line)


def main() -> None:
    """Take our own flag out of the command line; Hydra has the rest."""
    keep_standard_streams()
    is_dry = _DRY_RUN in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != _DRY_RUN]
    try:
        with as_rank():
            run_command(
                "train",
                TrainConfig,
                dry_run if is_dry else train,
                about=__doc__,
                writes="paths.run_dir",
                on_interrupt="interrupted. Nothing was trained; what was saved before is good.",
            )
    except SystemExit as leaving:
        if leaving.code != FAILED:
            raise
        # threads of the process group may still wait for ranks that are gone, and the interpreter's
        # own end aborts on them: all is said, written and closed by now
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)


if __name__ == "__main__":
    main()
