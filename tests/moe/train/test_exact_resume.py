"""A run killed at any moment and started again ends bitwise as the run that was never killed.

Real processes of launch/train.py, with everything on that could break this: SparseMixer's sampling
and input jitter, gradient accumulation, clipping, autocast, evaluation, W&B, reader processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from same_run import (
    assert_same_run,
    deterministic,
    finished_saves,
    last_recorded_step,
    unfinished_saves,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[3]
NUM_STEPS, SAVE_EVERY, GRAD_CLIP = 24, 2, 0.7
KILL_SEED = 20_260_730
START_SECONDS = 240.0  # a machine may be busy


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Starts launch/train.py in run_dir, always with the same command."""

    data_dir: Path
    run_dir: Path
    overrides: tuple[str, ...]

    def start(self) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [
                    sys.executable, str(REPOSITORY / "launch/train.py"), "experiment=nano",
                    f"paths.data_dir={self.data_dir}", f"paths.run_dir={self.run_dir}",
                    f"train.steps={NUM_STEPS}", "train.batch_size=8", "train.micro_batch_size=4",
                    f"train.save_every={SAVE_EVERY}", "train.evaluate_every=6",
                    "train.evaluate_tokens=2000", "train.sample_tokens=100",
                    "optim.warmup_steps=4", f"optim.grad_clip={GRAD_CLIP}", "router.z_coef=0.001",
                    *self.overrides,
                ],
                cwd=self.run_dir.parent,
                env={**environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a kill also takes its reader processes
            )  # fmt: skip

    @property
    def log(self) -> Path:
        return self.run_dir.parent / f"{self.run_dir.name}.log"

    @contextlib.contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Start; when the block is done, wait for success."""
        process = self.start()
        try:
            yield
            assert process.wait(timeout=START_SECONDS) == 0, self.log.read_text()
        finally:
            kill(process)

    def start_and_kill(self, is_time: Callable[[], bool], *, delay: float = 0.0) -> None:
        """Start, wait until it is time, send SIGKILL to the process and its children."""
        process, deadline = self.start(), time.monotonic() + START_SECONDS
        try:
            while not is_time():
                assert process.poll() is None, f"ended before its kill\n{self.log.read_text()}"
                assert time.monotonic() < deadline, f"too slow to kill\n{self.log.read_text()}"
                time.sleep(0.0005)
            time.sleep(delay)
        finally:
            kill(process)
        assert process.returncode == -signal.SIGKILL

    def start_and_kill_inside_a_save(self, *, after_step: int) -> None:
        """The folder of a save in progress is still there after the kill, which proves it."""
        for _ in range(4):
            before = unfinished_saves(self.run_dir)
            self.start_and_kill(functools.partial(self.is_saving, before, after_step))
            if unfinished_saves(self.run_dir) - before:
                return
            after_step = last_recorded_step(self.run_dir)  # the save was faster; catch a later one
        raise AssertionError("no kill hit a save")

    def is_saving(self, before: set[str], after_step: int) -> bool:
        new = unfinished_saves(self.run_dir) - before
        return any(int(name.split("-")[1].removeprefix("step_")) > after_step for name in new)


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_run_killed_five_times_ends_bitwise_as_one_never_killed(
    short_documents: Path, tmp_path: Path
) -> None:
    # in the foreground, so that each kill can be aimed at a save
    overrides = ("train.precision=bfloat16", "train.save_in_background=false")
    reference = Launcher(short_documents, tmp_path / "reference", overrides)
    run = Launcher(short_documents, tmp_path / "killed", overrides)
    with reference.to_the_end():
        kill_five_times(run, random.Random(KILL_SEED))
        with run.to_the_end():
            pass
    assert run.log.read_text().count("resume: ") == 4  # all starts but the first two
    assert_same_run(run.run_dir, reference.run_dir, num_steps=NUM_STEPS)
    assert (run.run_dir / "run.png").exists()
    records = [r for r in deterministic(run.run_dir) if r["kind"] == "train"]
    assert max(r["grad_norm"] for r in records) > GRAD_CLIP  # clipping really was on
    assert len({r["data_hash"] for r in records}) == NUM_STEPS


def kill_five_times(run: Launcher, chance: random.Random) -> None:
    """In the first save, at a random moment, in a later save, at another, after the last save."""
    run.start_and_kill_inside_a_save(after_step=0)
    assert finished_saves(run.run_dir) == []  # nothing to resume from
    early, late = chance.randint(3, 8), chance.randint(13, 19)
    run.start_and_kill(
        lambda: last_recorded_step(run.run_dir) >= early, delay=chance.uniform(0, 0.05)
    )
    run.start_and_kill_inside_a_save(after_step=9)
    run.start_and_kill(
        lambda: last_recorded_step(run.run_dir) >= late, delay=chance.uniform(0, 0.05)
    )
    run.start_and_kill(lambda: f"step_{NUM_STEPS:08d}" in finished_saves(run.run_dir))
    assert not (run.run_dir / "sample.txt").exists()  # before the files of the run's end


@pytest.mark.long
def test_reader_processes_and_wandb_do_not_change_a_resumed_run(
    short_documents: Path, tmp_path: Path
) -> None:
    precision = "train.precision=float32"
    reference = Launcher(short_documents, tmp_path / "reference", (precision,))
    run = Launcher(
        short_documents,
        tmp_path / "killed",
        (precision, "data.num_workers=2", "logging=offline", "train.save_every=5"),
    )
    with reference.to_the_end():
        run.start_and_kill(lambda: last_recorded_step(run.run_dir) >= 3)
        assert finished_saves(run.run_dir) == []  # so the next start begins anew
        run.start_and_kill(lambda: last_recorded_step(run.run_dir) >= 13)
        with run.to_the_end():
            pass
    assert_same_run(run.run_dir, reference.run_dir, num_steps=NUM_STEPS)
    whole = list((run.run_dir / "wandb").glob("offline-run-*"))
    replaced = list((run.run_dir / "wandb/replaced").glob("offline-run-*"))
    assert len(whole) == 1
    assert len({path.name.rpartition("-")[2] for path in [*whole, *replaced]}) == 1  # one run id
