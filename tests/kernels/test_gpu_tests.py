"""The tests in tests/gpu, where there is no GPU: they skip and say why, and their logic runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expert_cases import CASES

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="they run on this GPU themselves")


def run_gpu_tests(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As on a GPU machine: from the checkout, without plugins, by tests/gpu/pytest.ini."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PHI_GPU_TESTS_ON_CPU", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", *options],
        cwd=ROOT, env={**kept, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_without_a_gpu_they_are_skipped_one_by_one_with_the_reason():
    done = run_gpu_tests()
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    passed, skipped = (int(last.split(f" {word}")[0].split()[-1]) for word in ("passed", "skipped"))
    assert passed == len(CASES) + 5  # test_float64_experts.py, which needs no GPU
    assert skipped > 80
    reasons = {line.rsplit(": ", 1)[1] for line in done.stdout.splitlines() if "SKIPPED" in line}
    assert reasons
    assert all(reason.startswith("needs a CUDA device") for reason in reasons)


@pytest.mark.slow
def test_a_fifth_of_them_passes_in_the_interpreter():
    done = run_gpu_tests(
        "--part=0/5", "--show-capture=no", PHI_GPU_TESTS_ON_CPU="1", OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "passed" in done.stdout.splitlines()[-1]
