"""Kill random ranks of a run for some minutes, and measure what is left of the time.

usage: python launch/measure_recovery.py [--seconds 300] [--between 20] [--json FILE] [key=value]

Starts launch/train.py with launcher=torchrun and two ranks on this machine, and sends SIGKILL to a
random rank at random moments (exponential, --between seconds in the mean, through training, saves
and recoveries alike). Then the run is stopped with SIGTERM, which saves, and a run that nobody
kills trains as many steps: parameters, moments and all numbers must be the same bits. Prints one
line of a table, writes JSON, and exits with 1 where a bit differs. key=value: settings for both
runs, e.g. train.save_every=50.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels"), str(_ROOT / "launch")]

from measured_on import measured_on  # noqa: E402
from recovery_numbers import Kill, Line, is_step, outcomes, summary, table  # noqa: E402

from moe.train.checkpoint import open_checkpoint  # noqa: E402
from moe.train.metrics import Record, read_metrics  # noqa: E402

RESULTS = _ROOT / "launch/results/recovery_cpu.json"
# no end in sight: when to stop is this program's choice
SETTINGS = (
    "experiment=nano", "data.name=small", "tokenizer.vocab_size=1024", "launcher=torchrun",
    "launcher.processes_per_node=2", "launcher.max_restarts=1000",
    "parallel.expert_parallel_size=2", "parallel.zero_stage=2", "train.steps=1000000",
    "train.batch_size=8", "train.micro_batch_size=4", "train.precision=float32",
    "train.save_every=10", "train.evaluate_every=0", "train.sample_tokens=0",
)  # fmt: skip
_MEASURED = {"tokens_per_second", "step_seconds", "memory_gib", "mfu"}
_PATIENCE_SECONDS = 180.0
_SAVED = 75


def main() -> int:
    """Kill, compare, print, write; the exit code says whether all bits are the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="how long ranks are killed")
    parser.add_argument("--between", type=float, default=20.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=3, help="of moments and ranks")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the result goes")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for launch/train.py")
    arguments = parser.parse_args()
    if not (arguments.seconds > 0 and arguments.between > 0):
        parser.error("--seconds and --between: must be above 0")
    before = _provenance()
    settings = (*SETTINGS, *arguments.settings)
    with tempfile.TemporaryDirectory(prefix="phimoe_recovery_") as name:
        folder = Path(name)
        _prepare(folder)
        run = Run(folder, "killed", settings)
        kills = _kill_for(run, arguments.seconds, arguments.between, random.Random(arguments.seed))
        records = train_records(run.run_dir)
        print(f"killed {len(kills)} times; {len(records)} steps, now without kills", flush=True)
        undisturbed = Run(folder, "undisturbed", (*settings, f"train.save_every={len(records)}"))
        _train_undisturbed(undisturbed, len(records))
        told = outcomes(kills, run.lines)
        row = summary(told, records, wall_seconds=run.seconds())
        row |= {"is_bitwise_equal": _is_same(run.run_dir, undisturbed.run_dir, len(records))}
        row |= {"undisturbed_wall_seconds": undisturbed.seconds()}
    loop = {"kill_seconds": arguments.seconds, "mean_seconds_between_kills": arguments.between,
            "seed": arguments.seed, "settings": settings}  # fmt: skip
    result = before | loop | row | {"each_kill": [asdict(outcome) for outcome in told]}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(row)))
    print(f"written: {arguments.json}")
    return 0 if row["is_bitwise_equal"] else 1


@dataclass
class Run:
    """One command that trains, and what it says."""

    folder: Path
    name: str
    settings: Sequence[str]
    lines: list[Line] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    @property
    def run_dir(self) -> Path:
        return self.folder / self.name

    def seconds(self) -> float:
        """From the start of the command to its end, or to now."""
        return (self.ended or time.monotonic()) - self.began

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        """The launcher's process; ended with the block, and its ranks with it."""
        self.began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(_ROOT / "launch/train.py"), *self.settings,
             f"paths.run_dir={self.run_dir}"],
            cwd=self.folder, env=_environment(), stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            reader.join(timeout=_PATIENCE_SECONDS)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for text in process.stdout:
            seconds = time.monotonic() - self.began
            self.lines.append(Line(seconds, text.rstrip("\n"), recorded_step(self.run_dir)))

    def wait_for_step(self, process: subprocess.Popen[str], *, after: float) -> None:
        """Wait until ranks that started after that second have trained a step."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while not any(is_step(line.text) and line.seconds > after for line in self.lines):
            self.require_alive(process)
            if time.monotonic() > until:
                raise SystemExit(f"error: no step in {_PATIENCE_SECONDS:.0f} s\n{self.said()}")
            time.sleep(0.05)

    def require_alive(self, process: subprocess.Popen[str]) -> None:
        """Leave where the command has ended by itself."""
        if process.poll() is not None:
            raise SystemExit(f"error: it ended with {process.returncode}\n{self.said()}")

    def stop(self, process: subprocess.Popen[str]) -> None:
        """Let it save and end."""
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=_PATIENCE_SECONDS)
        self.ended = time.monotonic()
        if code != _SAVED:
            raise SystemExit(f"error: it ended with {code} after SIGTERM\n{self.said()}")

    def said(self) -> str:
        """Its last lines."""
        return "\n".join(line.text for line in self.lines[-30:])


def _kill_for(run: Run, seconds: float, between: float, chance: random.Random) -> list[Kill]:
    """Train while ranks are killed, then save and end."""
    kills: list[Kill] = []
    with run.started() as process:
        due = chance.expovariate(1 / between)
        while due < seconds:
            time.sleep(max(0.0, due - run.seconds()))
            run.require_alive(process)
            ranks = ranks_of(process.pid)
            if ranks:  # else the launcher has not started them yet: as soon as it has
                pid = chance.choice(sorted(ranks))
                with contextlib.suppress(ProcessLookupError):
                    at = run.seconds()
                    os.kill(pid, signal.SIGKILL)
                    kills.append(Kill(at, ranks[pid]))
                    print(f"{at:6.1f} s  killed rank {ranks[pid]}, step "
                          f"{recorded_step(run.run_dir)}", flush=True)  # fmt: skip
                    due += chance.expovariate(1 / between)
            else:
                time.sleep(0.02)
        time.sleep(max(0.0, seconds - run.seconds()))
        run.wait_for_step(process, after=kills[-1].seconds if kills else 0.0)
        run.stop(process)
    return kills


def _train_undisturbed(run: Run, num_steps: int) -> None:
    """Train until the checkpoint of that step is there."""
    with run.started() as process:
        while not (run.run_dir / _checkpoint_name(num_steps)).exists():
            run.require_alive(process)
            time.sleep(0.05)
        run.stop(process)


def _checkpoint_name(step: int) -> str:
    return f"checkpoints/step_{step:08d}"


def _is_same(killed: Path, undisturbed: Path, num_steps: int) -> bool:
    """Whether every number of every step, every parameter and every moment is the same."""
    records = train_records(killed)
    if [record["step"] for record in records] != list(range(1, num_steps + 1)):
        return False
    pairs = zip(records, train_records(undisturbed), strict=False)  # that one went a bit further
    if any(_without_measured(mine) != _without_measured(other) for mine, other in pairs):
        return False
    return digest(killed, num_steps) == digest(undisturbed, num_steps)


def _without_measured(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in _MEASURED}


def digest(run_dir: Path, step: int) -> str:
    """One SHA-256 of all parameters and moments of a step."""
    checkpoint = open_checkpoint(run_dir / _checkpoint_name(step))
    hashes = [sorted(checkpoint.hashes(stem).items()) for stem in ("model", "optimizer")]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def train_records(run_dir: Path) -> list[Record]:
    """The records of training steps, in the order of the file."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [record for record in records if record["kind"] == "train"]


def recorded_step(run_dir: Path) -> int:
    """The step of the last training record; 0 without one. Reads the file's end only."""
    with contextlib.suppress(OSError), (run_dir / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
        for text in reversed(file.read().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError):  # the first one may be the end of a line
                record = json.loads(text)
                if record["kind"] == "train":
                    return record["step"]
    return 0


def ranks_of(launcher_pid: int) -> dict[int, int]:
    """Process ids of the launcher's ranks, with their rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if not entry.name.isdigit():
                continue
            stat = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            variables = (entry / "environ").read_bytes().split(b"\0")
            rank = [v.removeprefix(b"RANK=") for v in variables if v.startswith(b"RANK=")]
            if int(stat[1]) == launcher_pid and rank:
                found[int(entry.name)] = int(rank[0])
    return found


def _prepare(folder: Path) -> None:
    """Some of the text of this machine's Python."""
    subprocess.run(
        [sys.executable, str(_ROOT / "launch/prepare_data.py"), "data.name=small",
         "data.max_bytes=2000000", "tokenizer.vocab_size=1024"],
        cwd=folder, env=_environment(), check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    left_out = ("WANDB_", "HYDRA_", "TORCHELASTIC_", "PHIMOE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels")])
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _provenance() -> dict[str, Any]:
    """Where and how this was measured."""
    return measured_on() | {
        "effective_time_is": " ".join(
            (summary.__doc__ or "").partition("effective_time: ")[2].split()
        ),
        "recovery_is": "from the kill to the end of the first step trained after it",
    }


if __name__ == "__main__":
    sys.exit(main())
