"""Ranks by the hundred start: each waits for all once, and for its own two groups."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("start_many_ranks.py")
ROOT = Path(__file__).parents[3]
EXPERT_PARALLEL = 8


@pytest.mark.parametrize(
    "world_size", [16, pytest.param(512, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_a_rank_waits_for_all_once_and_then_for_its_own_groups(
    world_size: int, environment: dict[str, str]
) -> None:
    """`pytest -m long -s` of this file prints what 512 real processes take."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(world_size), str(EXPERT_PARALLEL)],
        env=environment | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    agree, join, groups = report["seconds"]
    print(
        f"{world_size} ranks: agreed in {agree:.1f} s, joined in {join:.1f} s, "
        f"expert groups in {groups:.1f} s"
    )
    members = [world_size, EXPERT_PARALLEL, world_size // EXPERT_PARALLEL]
    assert report["waits"] == [members] * world_size
