"""Freed memory is used again instead of being faulted in page by page."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from moe.train.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
def fill(times):
    for _ in range(times):
        torch.ones(16 * 2**20)  # 64 MiB, 16,384 pages
fill(12)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(environment, mode):
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode == 77:
        pytest.skip("no glibc here")
    assert made.returncode == 0, made.stderr
    return int(made.stdout)


def test_the_second_step_takes_no_new_pages(environment):
    assert page_faults(environment, "keep") < 1000  # 163,840 pages are written
    assert page_faults(environment, "as it is") > 100_000  # or there is nothing to gain here
