"""Runs of two ranks that are killed in traps, one after the other, until all of them sprang."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rank_pool import REPOSITORY, TRAIN, Ended, Life
from same_run import (
    finished_saves,
    last_recorded_step,
    newest_checkpoint,
    recorded_steps,
    unfinished_saves,
)
from traps import NOTES, OF_FIRST, RECOVERY_PHASES, Trap, as_text

NUM_STEPS, SAVE_EVERY = 24, 2
# how often a rank may come to a place before it is killed there
_MOST = {"writing a file": 40, "reading a checkpoint": 12, "removing an old one": 8,
         "removing leftovers": 2, "copying tensors": 20, "before the rename": 2,
         "after the rename": 2} | {"forward": 10, "backward": 10, "update": 5}  # fmt: skip
AT_THE_END = ("write sample", "replacing sample.txt")
AFTER_A_START = (*RECOVERY_PHASES, "reading a checkpoint", "mending metrics.jsonl",
                 "removing leftovers")  # fmt: skip
_STEPS_OF_A_TRAP = 8  # in which any of them springs
_MARK = "PHIMOE_TEST_RUN"
_LAUNCH_SECONDS = 150.0


@dataclass(frozen=True)
class Sprung:
    """One kill: where it really was, and what became of the ranks."""

    trap: Trap
    detail: str
    thread: str
    codes: list[int]
    seconds: float  # from the kill to the end of the last rank
    step_before: int  # of the newest checkpoint, 0 without
    step_after: int


@dataclass
class Pool:
    """Starts ranks; see rank_pool.py."""

    process: subprocess.Popen[str]

    def live(self, life: Life) -> Ended:
        """Run all ranks to their end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(life)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the pool has died"
        return Ended(**json.loads(line))


@contextlib.contextmanager
def pool_of_ranks() -> Iterator[Pool]:
    """A pool that is ready; ended with the block."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_pool.py"))],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout), "the pool could not start"
        yield Pool(process)
    finally:
        process.kill()
        process.communicate()


def _environment(*paths: Path) -> dict[str, str]:
    left_out = ("WANDB_", "HYDRA_", "TORCHELASTIC_", "PHIMOE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    path = os.pathsep.join(map(str, [*paths, REPOSITORY, REPOSITORY / "kernels"]))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@dataclass
class Run:
    """A run of two ranks; always the same command."""

    folder: Path
    data_dir: Path
    zero_stage: int
    write_delay_seconds: float = 0.004  # some tens of writes: parameters change before the end
    mark: str = field(default_factory=lambda: f"{_MARK}={uuid.uuid4().hex}")

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "only"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def step(self) -> int:
        """Of the newest checkpoint; 0 without one."""
        names = finished_saves(self.run_dir)
        return int(names[-1].removeprefix("step_")) if names else 0

    def arguments(self) -> list[str]:
        """Of launch/train.py."""
        return train_arguments(self.data_dir, self.run_dir, zero_stage=self.zero_stage)

    def start(self, pool: Pool, trap: Trap | None = None) -> Ended:
        """Start both ranks and wait for their end; none of their processes is left then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "" if trap is None else as_text(trap)
        ended = pool.live(
            Life(
                self.arguments(), str(self.folder), str(self.log), self.mark, text,
                write_delay_seconds=self.write_delay_seconds,
            )
        )  # fmt: skip
        assert not ended.is_late, f"a rank did not end\n{self.log.read_text()[-6000:]}"
        assert_nobody_left(self.mark)
        return ended

    def to_the_end(self, pool: Pool) -> None:
        """Start and wait for success."""
        ended = self.start(pool)
        assert ended.codes == [0, 0], self.log.read_text()[-6000:]

    def kill(self, pool: Pool, trap: Trap) -> Sprung:
        """Start, be killed in the trap, and look at what is left: a whole checkpoint, or none."""
        before, run_id = self.step, self.run_id()
        (self.folder / NOTES).unlink(missing_ok=True)
        ended = self.start(pool, trap)
        said = self.log.read_text()[-6000:]
        assert self.notes(), f"{trap} never sprang, codes {ended.codes}\n{said}"
        [note] = self.notes()
        self._check_codes(trap, ended, said)
        assert "step -1" not in said
        assert run_id in ("", self.run_id())
        assert self.step >= before
        if self.step:
            assert newest_checkpoint(self.run_dir).step == self.step
        seconds = ended.ended_at - note["time"]
        return Sprung(trap, note["detail"], note["thread"], ended.codes, seconds, before, self.step)

    def launch(self, trap: Trap) -> int:
        """Start the launcher with the trap set in its ranks; its exit code when all have ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / NOTES).unlink(missing_ok=True)
        name, _, value = self.mark.partition("=")
        environment = _environment(Path(__file__).with_name("trap_in_ranks")) | {
            name: value, "PHIMOE_TEST_TRAP": as_text(trap),
            "PHIMOE_TEST_TRAP_FOLDER": str(self.folder),
        }  # fmt: skip
        launcher = ["launcher=torchrun", "launcher.processes_per_node=2"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(TRAIN), *self.arguments(), *launcher],
                cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            code = process.wait(timeout=_LAUNCH_SECONDS)
        finally:
            process.kill()
        assert_nobody_left(self.mark, seconds=_LAUNCH_SECONDS)
        assert self.notes(), f"{trap} never sprang\n{self.log.read_text()}"
        return code

    def _check_codes(self, trap: Trap, ended: Ended, said: str) -> None:
        killed = {"self": {trap.rank}, "other": {1 - trap.rank}, "both": {0, 1}, "guardian": set()}
        for rank, code in enumerate(ended.codes):
            is_killed = rank in killed[trap.victim]
            # one that lives on ends by itself with 70, or its guardian ends it
            assert code in ({-signal.SIGKILL} if is_killed else {70, -signal.SIGKILL}), (
                f"{trap}: rank {rank} ended with {code}\n{said}"
            )

    def notes(self) -> list[dict[str, Any]]:
        """What the trap of the last start wrote down when it sprang."""
        path = self.folder / NOTES
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run_id(self) -> str:
        """What the run folder says, "" as long as it says nothing."""
        path = self.run_dir / "run_id"
        return path.read_text() if path.exists() else ""

    def can_spring(self, trap: Trap) -> bool:
        """Whether the next start comes to the trap for sure."""
        if trap.place in (*AT_THE_END, "build model"):
            return True
        if trap.place in ("load parameters", "reading a checkpoint"):
            return self.step > 0
        if self.step > NUM_STEPS - _STEPS_OF_A_TRAP:
            return False
        if trap.place == "mending metrics.jsonl":
            return last_recorded_step(self.run_dir) > self.step
        if trap.place == "removing leftovers":
            return any(self._leftover_files())
        return True

    def _leftover_files(self) -> Iterator[Path]:
        for name in unfinished_saves(self.run_dir):
            yield from (self.run_dir / "checkpoints" / name).iterdir()


def train_arguments(data_dir: Path, run_dir: Path, *, zero_stage: int) -> list[str]:
    """One command for reference and killed runs, but for the run folder."""
    return [
        "experiment=nano", f"paths.data_dir={data_dir}", f"paths.run_dir={run_dir}",
        "parallel.expert_parallel_size=2", f"parallel.zero_stage={zero_stage}",
        f"train.steps={NUM_STEPS}", f"train.save_every={SAVE_EVERY}", "train.keep_last=1",
        "train.batch_size=8", "train.micro_batch_size=2", "train.precision=float32",
        "train.evaluate_every=8", "train.evaluate_tokens=500", "train.sample_tokens=20",
        "tokenizer.vocab_size=512", "optim.warmup_steps=4", "optim.grad_clip=0.7",
        "router.balance_scope=global", "router.z_coef=0.001",
    ]  # fmt: skip


def draw(place: str, chance: random.Random, *, victim: str | None = None) -> Trap:
    """A trap at a random moment of place, for a random victim."""
    rank = 0 if place in OF_FIRST else chance.randrange(2)
    return Trap(
        place,
        rank,
        occurrence=chance.randint(1, _MOST.get(place, 1)),
        fraction=chance.uniform(0, 0.9),
        victim=victim or chance.choice(["self", "self", "both", "other", "guardian"]),
    )


def assert_nobody_left(mark: str, *, seconds: float = 15.0) -> None:
    """Every process that has the mark in its environment ends by itself."""
    until = time.monotonic() + seconds
    while marked := _marked(mark.encode()):
        assert time.monotonic() < until, f"still running: {marked}"
        time.sleep(0.02)


def _marked(mark: bytes) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().decode().replace("\0", " "))
    return [words for words in found if words]  # one that has ended has no words


def assert_one_run(run: Run) -> None:
    """One folder, one identity, and every step once."""
    assert [path.name for path in (run.folder / "runs").iterdir()] == ["only"]
    assert newest_checkpoint(run.run_dir).state["train"]["run_id"] == run.run_id()
    assert recorded_steps(run.run_dir) == list(range(1, NUM_STEPS + 1))
    assert sorted(p.name for p in (run.run_dir / "checkpoints").iterdir()) == [
        "latest", f"step_{NUM_STEPS:08d}",
    ]  # fmt: skip


def table_of_places(kills: list[Sprung]) -> str:
    """How many kills there were at each place, of whom, and how soon all had ended."""
    lines = [f"{'place':<24}{'kills':>6}{'self':>6}{'other':>6}{'both':>6}{'guardian':>10}"
             f"{'all ended after, at most':>28}"]  # fmt: skip
    for place in dict.fromkeys(kill.trap.place for kill in kills):
        here = [kill for kill in kills if kill.trap.place == place]
        counts = [sum(kill.trap.victim == victim for kill in here)
                  for victim in ("self", "other", "both", "guardian")]  # fmt: skip
        longest = max(kill.seconds for kill in here)
        lines.append(
            f"{place:<24}{len(here):>6}{counts[0]:>6}{counts[1]:>6}{counts[2]:>6}{counts[3]:>10}"
            f"{longest:>26.1f} s"
        )
    return "\n".join(lines)
