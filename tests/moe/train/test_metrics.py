"""metrics.jsonl holds every step once, whatever happens to the process or the disk."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.errors import DataError, UserError
from moe.train import metrics
from moe.train.metrics import JsonlSink, Sinks, read_metrics, stream_metrics


def refuse_constant(word: str) -> None:
    raise AssertionError(f"{word} is not strict JSON")


def strict_lines(path: Path) -> list[dict[str, object]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]


def write_steps(path: Path, steps: range, *, resume_step: int | None = None) -> None:
    sink = JsonlSink(path, resume_step=resume_step)
    for step in steps:
        sink.write(step, {"kind": "train", "loss": 1.0 / (step + 1)})
    sink.close()


def test_a_record_comes_back_as_it_was_written_to_the_last_bit(tmp_path: Path) -> None:
    record = {
        "kind": "train", "loss": 0.1 + 0.2, "tokens_seen": 2**53 + 1, "skipped": False,
        "note": "zwei\nZeilen é", "router/load_LE": [[0.25, 0.75], [1.0, 0.0]],
        "router/entropy_L": [], "tiny": 5e-324,
    }  # fmt: skip
    sink = JsonlSink(tmp_path / "deep" / "metrics.jsonl")
    sink.write(7, record)
    sink.close()
    assert read_metrics(sink.path) == [{"step": 7, **record}]
    assert next(iter(strict_lines(sink.path)[0])) == "step"


def test_the_step_argument_wins_over_a_step_inside_the_record(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write(3, {"step": 99, "loss": 1.0})
    assert strict_lines(sink.path) == [{"step": 3, "loss": 1.0}]
    sink.close()


def test_non_finite_numbers_are_strings_on_disk_and_floats_when_read(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write(0, {"loss": math.nan, "a": math.inf, "list": [[-math.inf, 1.0]], "t": "nano"})
    sink.close()
    line = strict_lines(sink.path)[0]
    assert line == {"step": 0, "loss": "nan", "a": "inf", "list": [["-inf", 1.0]], "t": "nano"}
    record = read_metrics(sink.path)[0]
    assert math.isnan(record["loss"])
    assert record["a"] == math.inf
    assert record["list"] == [[-math.inf, 1.0]]
    assert record["t"] == "nano"


def test_numbers_and_arrays_of_numpy_and_torch_are_written(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write(
        1,
        {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": np.eye(2), "d": np.bool_(True),
         "e": np.float64(np.nan), "f": (1, 2)},
    )  # fmt: skip
    sink.close()
    assert strict_lines(sink.path) == [
        {"step": 1, "a": 0.5, "b": 2.0, "c": [[1.0, 0.0], [0.0, 1.0]], "d": True, "e": "nan",
         "f": [1, 2]}
    ]  # fmt: skip


def test_a_value_that_json_cannot_hold_is_refused_and_leaves_no_line(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    with pytest.raises(TypeError, match="object"):
        sink.write(0, {"loss": object()})
    sink.close()
    assert sink.path.read_bytes() == b""


def test_every_line_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    for step in range(3):
        sink.write(step, {"loss": 1.0})
        assert len(strict_lines(sink.path)) == step + 1
    sink.close()


def test_resume_drops_later_steps_and_goes_on_without_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, range(10))
    write_steps(path, range(6, 12), resume_step=5)
    assert [line["step"] for line in strict_lines(path)] == list(range(12))
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_at_any_cut_of_the_file_leaves_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, range(8))
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        assert [r["step"] for r in read_metrics(path)] in [list(range(n)) for n in range(9)]
        JsonlSink(path, resume_step=4).close()
        steps = [line["step"] for line in strict_lines(path)]
        # a line cut exactly before its newline is whole, so it is kept
        assert steps == list(range(min(5, (content[:length] + b"\n").count(b"}\n"))))


def test_a_fresh_start_keeps_the_earlier_file_beside_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, range(3))
    write_steps(path, range(1))
    assert [r["step"] for r in read_metrics(path)] == [0]
    assert [r["step"] for r in read_metrics(tmp_path / "m.jsonl.old")] == [0, 1, 2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, range(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"step": 1, "lo\n' + lines[2])
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    with pytest.warns(RuntimeWarning, match="line 2"):
        JsonlSink(path, resume_step=2).close()
    assert [r["step"] for r in read_metrics(path)] == [0, 2]


def test_a_long_file_is_read_and_mended_a_line_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    for step in range(1, 601):
        sink.write(step, {"kind": "train", "router/load_LE": [[0.0625] * 16] * 32})
    sink.close()
    parsed = []
    monkeypatch.setattr(metrics, "_parse", lambda line, parse=metrics._parse: (
        parsed.append(len(line)) or parse(line)
    ))  # fmt: skip
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_metrics(path)) == 600
        assert len(parsed) == 600
        parsed.clear()
        JsonlSink(path, resume_step=599).close()
        assert not parsed, "steps are told by the ends of a line"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [r["step"] for r in read_metrics(path)] == list(range(1, 600))
    assert peak < path.stat().st_size / 4


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_log_of_a_hundred_thousand_steps_is_gone_on_with_and_read(tmp_path: Path) -> None:
    """`pytest -m long -s` of this file prints seconds; a line is as long as Phi-3.5-MoE's."""
    path = tmp_path / "m.jsonl"
    record = {"kind": "train", "loss": 2.5, "router/load_LE": [[0.0625125] * 16] * 32}
    line = json.dumps({"step": -1, **record}) + "\n"
    with path.open("w") as file:
        file.writelines(line.replace("-1", str(step), 1) for step in range(100_000))
    began = time.monotonic()
    JsonlSink(path, resume_step=99_000).close()
    mended = time.monotonic()
    num_read = sum(1 for _ in stream_metrics(path))
    read = time.monotonic()
    print(
        f"100,000 steps, {path.stat().st_size / 1e6:,.0f} MB: gone on with after "
        f"{mended - began:.1f} s, read in {read - mended:.1f} s"
    )
    assert num_read == 99_001


@pytest.mark.parametrize(
    "odd",
    ['{"step": 2, "loss": 1.0, "note": "a {curly} one"}', '{"loss": 1.0, "step": 2}'],
)
def test_a_line_of_another_writer_is_kept_by_its_step(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, range(2))
    path.write_text(path.read_text() + odd + "\n")
    for resume_step in (2, 1):
        JsonlSink(path, resume_step=resume_step).close()
        assert [r["step"] for r in read_metrics(path)] == list(range(resume_step + 1))


def test_two_lines_run_into_one_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, range(3))
    path.write_text(path.read_text().replace('0.5}\n{"step": 2', '0.{"step": 2'))
    with pytest.warns(RuntimeWarning, match="line 2"):
        JsonlSink(path, resume_step=2).close()
    assert [r["step"] for r in read_metrics(path)] == [0]


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: cannot be read"):
        read_metrics(tmp_path / "nothing.jsonl")


KILLED = """
import sys
from moe.train.metrics import JsonlSink
sink = JsonlSink(sys.argv[1], resume_step=int(sys.argv[2]))
step = int(sys.argv[2])
while True:
    step += 1
    sink.write(step, {"loss": 1.0, "filler": [0.125] * 2000})
    print(step, flush=True)
"""


def test_sigkill_while_writing_never_costs_a_step_that_was_reported(tmp_path: Path) -> None:
    path, reached, source = tmp_path / "m.jsonl", 0, random.Random(1)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(reached)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for _ in range(source.randint(5, 40)):
            reached = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps = [r["step"] for r in read_metrics(path)]
        assert steps[:reached] == list(range(1, reached + 1))
        assert steps == sorted(set(steps))


FULL = """
import resource, sys
from moe.errors import UserError
from moe.train.metrics import JsonlSink
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sink = JsonlSink(sys.argv[1])
try:
    for step in range(1000):
        sink.write(step, {"loss": 1.0})
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_file_that_cannot_grow_is_one_message_and_stays_valid(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert str(path) in done.stdout
    assert "paths.run_dir" in done.stdout
    assert done.stderr == ""
    steps = [line["step"] for line in strict_lines(path)]
    assert steps == list(range(len(steps)))
    assert 900 < path.stat().st_size <= 1000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_a_user_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    sink = JsonlSink(tmp_path / "m.jsonl")
    with pytest.raises(UserError, match=r"m\.jsonl: cannot be written \(No space left"):
        sink.write(0, {"loss": 1.0})
    sink.close()


def test_a_folder_in_place_of_the_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        JsonlSink(tmp_path / "file" / "m.jsonl")


class Recorder:
    """Keeps what it gets; raises its error, if it has one, at the given step and at close."""

    def __init__(self, *, may_fail: bool, error: BaseException | None = None, at: int = 0) -> None:
        self.may_fail, self.error, self.at = may_fail, error, at
        self.steps: list[int] = []
        self.is_closed = False

    def write(self, step: int, record: dict[str, object]) -> None:
        if self.error is not None and step >= self.at:
            raise self.error
        self.steps.append(step)

    def close(self) -> None:
        self.is_closed = True
        if self.error is not None:
            raise self.error


def write_five_steps(sinks: Sinks) -> None:
    with sinks:
        for step in range(5):
            sinks.write(step, {"loss": 1.0})


def test_a_sink_that_may_fail_warns_once_and_the_others_go_on() -> None:
    broken = Recorder(may_fail=True, error=ConnectionError("service died"), at=2)
    good = Recorder(may_fail=False)
    with pytest.warns(RuntimeWarning, match=r"Recorder .*service died") as caught:
        write_five_steps(Sinks([broken, good]))
    assert len(caught) == 1
    assert broken.steps == [0, 1]
    assert good.steps == [0, 1, 2, 3, 4]
    assert good.is_closed


def test_a_sink_that_must_work_stops_the_run_after_all_sinks_have_the_record() -> None:
    broken, good = Recorder(may_fail=False, error=UserError("disk full")), Recorder(may_fail=True)
    sinks = Sinks([broken, good])
    with pytest.raises(UserError, match="disk full"):
        sinks.write(0, {})
    assert good.steps == [0]
    with pytest.raises(UserError):
        sinks.close()
    assert good.is_closed


def test_an_interrupt_is_never_swallowed() -> None:
    sinks = Sinks([Recorder(may_fail=True, error=KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        sinks.write(0, {})
