"""From a real run to its replay: what was recorded is what was trained on, and no kill shows in it.

A nano model is trained for 100 steps by launch/train.py, recording every one, and traced by
launch/trace.py; both again with a SIGKILL at each place of their writing.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_in_writing import PLACES, Life

from moe.data.loader import training_batches
from moe.data.shards import TokenSplit, open_split
from moe.load_run import load_run
from moe.trace.batch import TraceBatch, join_rows
from moe.trace.documents import choose_documents, load_batch
from moe.trace.read import Trace, open_trace
from moe.trace.replay import replay_batches
from moe.train.metrics import read_metrics

pytestmark = pytest.mark.slow

NUM_STEPS, SAVE_EVERY = 100, 20
TRAIN = [
    "experiment=nano", "parallel=plain", "tokenizer.vocab_size=512", f"train.steps={NUM_STEPS}",
    f"train.save_every={SAVE_EVERY}", "train.evaluate_every=0", "train.precision=float32",
    "train.trace_every=1",
]  # fmt: skip
TRACE = ["split=train", "seq_len=48", "batch_size=8", "part_tokens=2000"]
# place, and the how manieth time: each life comes past a checkpoint or a part, but for the first
KILLED_IN_TRAINING = (
    ("part written", 5), ("part opened", 26), ("checkpoint named", 1), ("half a write", 400),
    ("part named", 5), ("noted", 3),  # of steps 90 and 100: a list is written as it grows
)  # fmt: skip
KILLED_IN_TRACING = (
    ("part opened", 1), ("half a write", 150), ("part written", 2), ("part named", 3),
    ("noted", 3), ("about to be finished", 1), ("finished", 1),
)  # fmt: skip

# live(name, arguments, place="", occurrence=1) -> exit code; killed is -9
Live = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def live(folder: Path, environment: dict[str, str]) -> Iterator[Live]:
    worker = Path(__file__).with_name("killed_in_writing.py")
    pool = subprocess.Popen(
        [sys.executable, str(worker)], cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert pool.stdin is not None
    assert pool.stdout is not None
    stdin, stdout = pool.stdin, pool.stdout

    def run(name: str, arguments: list[str], place: str = "", occurrence: int = 1) -> int:
        log = folder / "log"
        # slower than a step: a checkpoint that did not wait for the recorder would be ahead of it
        delay = 0.15 if place == "checkpoint named" else 0.0
        life = Life(name, arguments, str(log), place, occurrence, delay)
        stdin.write(json.dumps(asdict(life)) + "\n")
        stdin.flush()
        code = int(stdout.readline())
        assert code == (-signal.SIGKILL if place else 0), f"{place}: {log.read_text()[-5000:]}"
        return code

    try:
        assert stdout.readline() == "ready\n"
        yield run
    finally:
        pool.kill()
        pool.communicate()


def train(live: Live, folder: Path, data: Path, name: str, *killed: tuple[str, int]) -> Path:
    """A run that was killed at these places, one after the other, and went on to its end."""
    run_dir = folder / "runs" / name
    arguments = [*TRAIN, f"paths.data_dir={data}", f"paths.run_dir={run_dir}"]
    for place in (*killed, ()):
        live("train", arguments, *place)
    return run_dir


@pytest.fixture(scope="module")
def run_dir(live: Live, folder: Path, short_documents: Path) -> Path:
    return train(live, folder, short_documents, "whole")


@pytest.fixture(scope="module")
def text(short_documents: Path) -> TokenSplit:
    return open_split(short_documents, "train", verify=True)


def steps_of(trace: Trace) -> Iterator[tuple[int, TraceBatch]]:
    for step in trace.info.steps:
        yield step, join_rows(list(trace.batches(steps=[step])))


def test_every_count_is_the_one_that_the_log_reports(run_dir: Path) -> None:
    log = {r["step"]: r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"}
    trace = open_trace(run_dir / "routing")
    assert trace.info.steps == tuple(log) == tuple(range(1, NUM_STEPS + 1))
    num_experts, seen = trace.info.num_experts, set()
    for step, rows in steps_of(trace):
        # the log keeps six digits of a share of about a thousand choices: far from half of one
        reported_LE = np.array(log[step]["router/load_LE"]) * rows.num_rows * trace.info.top_k
        count_LE = np.stack([
            np.bincount(rows.expert_TLK[:, layer].ravel(), minlength=num_experts)
            for layer in range(trace.info.num_layers)
        ])  # fmt: skip
        assert np.abs(reported_LE - count_LE).max() < 0.01, step
        seen.update(count_LE.ravel().tolist())
    assert len(seen) > 50  # so that equal counts are no accident


def test_the_tokens_are_those_that_the_loader_gave(run_dir: Path, text: TokenSplit) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    batches = training_batches(
        text, seed=config["seed"], seq_len=config["data"]["seq_len"],
        batch_size=config["train"]["batch_size"],
        micro_batch_size=config["train"]["micro_batch_size"],
        start_step=0, num_steps=NUM_STEPS, rank=0, world_size=1, num_workers=0,
    )  # fmt: skip
    recorded = steps_of(open_trace(run_dir / "routing"))
    for (step, rows), micro_batches in zip(recorded, batches, strict=True):
        assert set(rows.step_T) == {step}
        for name, got_T in (
            ("tokens", rows.token_T), ("position", rows.position_T), ("domain", rows.domain_T),
        ):  # fmt: skip
            expected = [getattr(b, name)[b.document >= 0] for b in micro_batches]
            assert np.array_equal(got_T, torch.cat(expected).numpy()), (step, name)


def test_a_run_killed_at_every_place_of_its_recording_records_the_same_bytes(
    live: Live, folder: Path, short_documents: Path, run_dir: Path
) -> None:
    killed = train(live, folder, short_documents, "killed", *KILLED_IN_TRAINING)
    require_same_parts(killed / "routing", run_dir / "routing")
    ours, theirs = (open_trace(r / "routing").info.parts for r in (killed, run_dir))
    assert [(p.name, p.step, p.sha256) for p in ours] == [
        (p.name, p.step, p.sha256) for p in theirs
    ]
    assert len(ours) == NUM_STEPS


def require_same_parts(ours: Path, theirs: Path) -> None:
    """The same files, no other, and each of the same bytes."""
    of_ours, of_theirs = (
        {path.name: path.read_bytes() for path in folder.iterdir() if ".parquet" in path.name}
        for folder in (ours, theirs)
    )
    assert of_ours.keys() == of_theirs.keys()
    for name, content in of_theirs.items():
        assert of_ours[name] == content, name


@pytest.fixture(scope="module")
def traced(live: Live, folder: Path, run_dir: Path) -> Path:
    target = folder / "traces/whole"
    live("trace", [f"run={run_dir}", f"target={target}", *TRACE])
    return target


def test_a_trace_killed_at_every_place_of_its_writing_ends_with_the_same_bytes(
    live: Live, folder: Path, run_dir: Path, traced: Path
) -> None:
    target = folder / "traces/killed"
    arguments = [f"run={run_dir}", f"target={target}", *TRACE]
    for place, occurrence in KILLED_IN_TRACING:
        assert not (target / "trace.json").exists()
        live("trace", arguments, place, occurrence)
    live("trace", arguments)
    require_same_parts(target, traced)
    names = {path.name for path in traced.iterdir()}
    assert {path.name for path in target.iterdir()} - {"progress.json"} == names
    assert len(open_trace(traced).info.parts) > sum(
        n for place, n in KILLED_IN_TRACING if place in ("part written", "part named", "noted")
    )
    assert {place for place, _ in KILLED_IN_TRACING + KILLED_IN_TRAINING} == set(PLACES)


@torch.no_grad()
def test_replaying_the_trace_gives_the_logits_of_the_run_bit_for_bit(
    run_dir: Path, traced: Path, text: TokenSplit
) -> None:
    model = load_run(str(run_dir), device=torch.device("cpu"), on_skip=pytest.fail).model
    batches = choose_documents(text, seq_len=48, max_tokens=0, batch_size=8, domains=())
    num_tokens, trace = 0, open_trace(traced)
    for batch, numbers_B in zip(replay_batches(trace, model.config), batches, strict=True):
        tokens_BS, _ = load_batch(text, numbers_B, seq_len=48)
        assert torch.equal(batch.tokens_BS, tokens_BS)
        places = {"position_BS": batch.position_BS}
        plain, forced = model(tokens_BS, **places), model(tokens_BS, **places, forced=batch.forced)
        assert torch.equal(plain.logits, forced.logits)
        num_tokens += int(batch.valid_BS.sum())
    assert num_tokens == trace.info.num_tokens == int(text.documents["tokens"].clip(max=48).sum())
