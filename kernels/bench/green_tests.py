"""Whether the tests of what is about to be measured pass: wrong kernels get no numbers.

usage: python kernels/bench/green_tests.py

As a script it runs all of tests/gpu, in as many processes as compile well at once, and prints what
failed and what was skipped and why.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# at the same time, because most of their time is compilation on the host
GPU_GROUPS: tuple[tuple[str, ...], ...] = (
    *(("tests/gpu/test_expert_mlp.py", f"--part={part}/4") for part in range(4)),
    (
        "tests/gpu/test_routing.py",
        "tests/gpu/test_float64_experts.py",
        "tests/gpu/test_in_programs.py",
        "tests/gpu/test_moe_layer.py",
    ),
    ("tests/gpu/test_real_shapes.py", "tests/gpu/test_memory.py"),
    ("tests/gpu/test_big_tensors.py",),
)
# apart: its tools may take minutes, and report calls that are other libraries'
SANITIZER: tuple[tuple[str, ...], ...] = (("tests/gpu/test_sanitizer.py",),)


class Outcome(NamedTuple):
    """Counts over all groups, seconds of wall time, why tests were skipped, what failed."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    skips: tuple[str, ...]
    output: str  # of the groups with failures

    @property
    def is_green(self) -> bool:
        return self.failed == 0 and self.passed > 0

    def lines(self) -> list[str]:
        """Reasons of skipped tests, then the counts."""
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return [*self.skips, f"tests: {counts} in {self.seconds:.0f} s"]


def run_tests(
    groups: tuple[tuple[str, ...], ...], *, limit: float, logs: Path | None = None
) -> Outcome:
    """Run each group of test files in a process of its own; a group that takes too long fails.

    What each group prints is in the folder `logs`, while it runs and afterwards.
    """
    begin = time.perf_counter()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    output, skips = [], []
    with contextlib.ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        running = []
        for number, group in enumerate(groups):
            report, log = Path(folder, f"{number}.xml"), Path(folder, f"{number}.txt")
            command = [
                sys.executable, "-m", "pytest", *group, "-q", "-p", "no:cacheprovider", "-rs",
                f"--junitxml={report}", "--show-capture=stdout",
            ]  # fmt: skip
            with log.open("w") as stream:
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            running.append((process, report, log))
        for process, report, log in running:
            found, text = _result(process, report, log, limit - (time.perf_counter() - begin))
            counts = {key: counts[key] + found[key] for key in counts}
            skips += [line for line in text.splitlines() if line.startswith("SKIPPED")]
            if found["failed"]:
                output.append(text)
    seconds = time.perf_counter() - begin
    return Outcome(**counts, seconds=seconds, skips=tuple(skips), output="\n".join(output))


def _result(
    process: subprocess.Popen[bytes], report: Path, log: Path, limit: float
) -> tuple[dict[str, int], str]:
    try:
        code = process.wait(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with whatever it started: the GPU must be free
        process.wait()
        return _counts(0, 1, 0), f"{log.read_text()}\nstopped: out of time"
    text = log.read_text()
    if code not in (0, 1) or not report.exists():
        return _counts(0, 1, 0), text  # no tests, or pytest itself failed
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, wrong, skipped = (
        sum(int(suite.get(name, "0")) for name in names for suite in suites)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return _counts(total - wrong - skipped, max(wrong, code), skipped), text


def _counts(passed: int, failed: int, skipped: int) -> dict[str, int]:
    return {"passed": passed, "failed": failed, "skipped": skipped}


def main() -> int:
    """Run tests/gpu; 0 when green."""
    outcome = run_tests(GPU_GROUPS + SANITIZER, limit=600.0)
    if outcome.output:
        print(outcome.output)
    print("\n".join(outcome.lines()))
    return 0 if outcome.is_green else 1


if __name__ == "__main__":
    raise SystemExit(main())
