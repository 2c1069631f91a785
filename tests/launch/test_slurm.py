"""A real SLURM with two nodes: trained across both, saved, queued again, cancelled, refused.

Installs Debian's slurm-wlm and munge where it is root and they are missing; says why it does not.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import reason_not_to, two_nodes

from moe.train.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NODES = ["launcher=slurm", "launcher.num_nodes=2", "launcher.time=10:00", "parallel.device=cpu"]
LONG_ENOUGH = ["train.steps=30", "train.save_every=4", "train.evaluate_every=0",
               "train.evaluate_tokens=500", "train.sample_tokens=0",
               "train.micro_batch_size=4"]  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds two nodes."""
    reason = reason_not_to()
    if reason:
        pytest.skip(f"two SLURM nodes on this machine: {reason}")
    with two_nodes(tmp_path_factory.mktemp("slurm")) as environment:
        yield {"SLURM_CONF": environment["SLURM_CONF"], "PATH": environment["PATH"]}


@pytest.fixture
def submit(command, workplace, place, slurm) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call submit(*overrides): launch/train.py launcher=slurm on two nodes, run folder runs/s."""

    def of(*overrides: str) -> subprocess.CompletedProcess[str]:
        keys = {a.partition("=")[0] for a in overrides}
        usual = [a for a in workplace.train if a != "parallel=plain"]
        usual = [a for a in usual if a.partition("=")[0] not in {*keys, "train.steps",
                 "train.save_every", "train.evaluate_every"}]  # fmt: skip
        more = [a for a in LONG_ENOUGH if a.partition("=")[0] not in keys]
        return command("train", *usual, *more, *NODES, "paths.run_dir=runs/s", *overrides,
                       cwd=place, env=slurm)  # fmt: skip

    return of


class Queue:
    """What SLURM says of one job."""

    def __init__(self, submitted: subprocess.CompletedProcess[str], slurm: dict[str, str]) -> None:
        assert submitted.returncode == 0, submitted.stderr
        said = dict(line.split(": ", 1) for line in submitted.stdout.splitlines())
        self.number, self.log = said["job"], Path(said["log"])
        assert said["cancel it with"] == f"scancel {self.number}"
        self._slurm = slurm

    def call(self, *words: str) -> str:
        done = subprocess.run(words, env=self._slurm, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def field(self, name: str) -> str:
        shown = self.call("scontrol", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found[1]

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_line(self, pattern: str, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.said(), re.MULTILINE):
            assert time.monotonic() < deadline, (pattern, self.said(), self.field("JobState"))
            time.sleep(0.2)

    def wait_for_end(self, *, seconds: float = 120) -> str:
        """The last state; what is queued again starts at once, not after SLURM's two minutes."""
        deadline = time.monotonic() + seconds
        while (state := self.field("JobState")) in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, (state, self.said())
            if state == "PENDING" and self.field("Reason") == "BeginTime":
                self.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")
            time.sleep(0.3)
        return state


def steps_of(run: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]


def test_a_job_over_two_nodes_outlives_a_signal_a_requeue_and_a_killed_rank(submit, slurm, place):
    job = Queue(submit("logging=offline"), slurm)
    job.wait_for_line(r"^step +[5-9]/")
    nodes = job.call("squeue", "--noheader", "--jobs", job.number, "--format=%N").strip()
    assert nodes == "s[1-2]"
    job.call("scancel", "--signal=USR1", job.number)  # as SLURM does before the time is up
    job.wait_for_line(r"is queued again")
    assert "stopped by SIGUSR1 after step" in job.said()
    wait_until_it_runs_again(job, restarts=1)
    job.call("scontrol", "requeue", job.number)
    wait_until_it_runs_again(job, restarts=2)
    job.wait_for_line(r"(resume: [^\0]*){2}^step +(1[5-9]|2\d)/")
    kill_a_rank(place)
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert job.field("Restarts") == "2"  # the killed rank is replaced on the nodes that are held
    assert "on the same nodes (restart 1 of 3)" in job.said()
    assert job.said().count("resume: ") == 3
    run = place / "runs" / "s"
    assert steps_of(run) == list(range(1, 31))
    assert len({p.name.rpartition("-")[2] for p in run.glob("wandb/**/offline-run-*")}) == 1
    assert (run / "run.png").is_file()
    assert len(list((run / "slurm").glob("job_*.log"))) == 1


def wait_until_it_runs_again(job: Queue, *, restarts: int) -> None:
    for _ in range(300):
        if job.field("JobState") == "PENDING" and job.field("Reason") == "BeginTime":
            job.call("scontrol", "update", f"JobId={job.number}", "StartTime=now")
        if job.field("Restarts") == str(restarts) and job.field("JobState") == "RUNNING":
            break
        time.sleep(0.2)
    job.wait_for_line(rf"(resume: [^\0]*){{{restarts}}}^step ")


def kill_a_rank(place: Path) -> None:
    """SIGKILL to the process of rank 1 that trains in place."""
    for path in Path("/proc").iterdir():
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            is_ours = (path / "cwd").readlink() == place and b"launch/train.py" in (
                path / "cmdline"
            ).read_bytes()
        except OSError:
            continue
        if is_ours and b"RANK=1" in variables:
            subprocess.run(["kill", "-KILL", path.name], check=True)
            return
    raise AssertionError("no rank 1")


@pytest.mark.long
def test_a_cancelled_job_saves_and_stays_cancelled(submit, slurm, place):
    job = Queue(submit(), slurm)
    job.wait_for_line(r"^step +[5-9]/")
    job.call("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    job.wait_for_line("stopped by SIGTERM after step")
    assert "queued again" not in job.said()
    last = steps_of(place / "runs" / "s")[-1]
    assert (place / f"runs/s/checkpoints/step_{last:08}/manifest.json").is_file()


def test_what_ranks_refuse_is_said_once_and_not_queued_again(submit, slurm):
    job = Queue(submit("model.vocab_size=256"), slurm)
    assert job.wait_for_end() == "FAILED"
    assert job.field("ExitCode") == "2:0"
    assert job.field("Restarts") == "0"
    assert job.said().count("model.vocab_size: got 256") == 1
    assert "Traceback" not in job.said()


@pytest.mark.long
def test_what_sbatch_refuses_is_one_message_and_leaves_nothing(submit, place):
    done = submit("launcher.partition=nope")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "launcher: sbatch refuses the job: " in done.stderr
    assert "invalid partition" in done.stderr
    assert not (place / "runs").exists()


@pytest.mark.long
def test_an_allocation_of_somebody_else_does_not_make_ranks(environment, workplace, place, slurm):
    """The same command by hand on two nodes: each task stays one process of its own."""
    train = shlex.join([sys.executable, str(ROOT / "launch" / "train.py"), *workplace.train])
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks=2", "bash", "-c",
         f"{train} paths.run_dir=runs/$SLURM_PROCID"],
        cwd=place, env=environment | slurm, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plain, 1 process(es)") == 2
    assert {path.name for path in (place / "runs").iterdir()} == {"0", "1"}
