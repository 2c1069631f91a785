"""What the plan says, and that its advice is what it computed."""

from __future__ import annotations

import dataclasses
import re

import pytest

from moe.config import LoopConfig, ParallelConfig, TrainConfig
from moe.errors import ConfigError
from moe.plan.advice import changes_that_fit, fastest_that_fits, smallest, usable_bytes
from moe.plan.compare import compare_lines, run_lines
from moe.plan.memory import rank_memory
from moe.plan.report import in_words, layout_lines, plan_lines
from moe.plan.times import step_time
from moe.plan_config import ClusterConfig

H100 = ClusterConfig()


def test_the_plan_of_a_run_names_ranks_groups_and_what_is_assumed():
    config = TrainConfig(
        parallel=ParallelConfig(zero_stage=1, expert_parallel_size=2),
        train=LoopConfig(batch_size=16, micro_batch_size=2),
    )
    text = "\n".join(plan_lines(config, world_size=4, gpus_per_node=4))
    assert "ranks               0 to 3 on 1 node" in text
    assert "2 expert groups     0-1 | 2-3; inside a node, 8 experts each" in text
    assert "2 data groups       0,2 | 1,3; the same experts" in text
    assert "16 windows of 256 = 4 ranks x 2 micro-batches of 2; 4,096 tokens" in text
    assert "fits:" in text
    assert "rates assumed" in text
    for part in ("masters", "Adam's moments", "gradient bucket", "expert rows", "MFU"):
        assert part in text


def test_a_layout_that_cannot_be_has_no_plan():
    config = TrainConfig(
        parallel=ParallelConfig(expert_parallel_size=2),
        train=LoopConfig(batch_size=12, micro_batch_size=4),
    )
    with pytest.raises(ConfigError, match="expert_parallel_size: got 2 with 3 processes"):
        plan_lines(config, world_size=3, gpus_per_node=8)


def test_columns_are_aligned_and_no_line_is_ragged(on_512):
    for line in layout_lines(on_512, H100):
        assert line == line.rstrip()
    rows = [line for line in layout_lines(on_512, H100) if re.search(r" (GiB|MiB|KiB|B)$", line)]
    assert len({len(row) for row in rows}) == 1


def test_what_does_not_fit_is_said_with_changes_that_do(on_512):
    large = dataclasses.replace(on_512, expert_parallel_size=1, zero_stage=0)
    text = "\n".join(layout_lines(large, H100))
    assert "DOES NOT FIT" in text
    assert "the largest part: Adam's moments, 311.98 GiB" in text
    found = changes_that_fit(large, H100)
    assert found
    for change in found:
        assert change.num_bytes == rank_memory(change.layout).total <= usable_bytes(H100)
        assert change.seconds == step_time(change.layout, H100).seconds
        assert " ".join(change.keys) in text
    # no single change was passed over
    singles = [change for change in found if len(change.keys) == 1]
    assert [c.keys for c in singles] == [
        ("parallel.expert_parallel_size=16",),
        ("parallel.zero_stage=3",),
    ]


def test_where_nothing_fits_it_says_so(on_512):
    tiny = dataclasses.replace(H100, memory_gib=5.0, reserved_gib=1.0)
    text = "\n".join(layout_lines(on_512, tiny))
    least = smallest(on_512, tiny)
    assert "no layout of these 512 GPUs fits" in text
    assert in_words(least.num_bytes) in text
    assert fastest_that_fits(on_512, tiny) is None
    assert compare_lines(on_512, tiny)[-1] == "no layout fits these GPUs"


def test_the_fastest_that_fits_is_no_slower_than_any_other(on_512):
    best = fastest_that_fits(on_512, H100)
    assert best is not None
    for change in changes_that_fit(on_512, H100, most=1000):
        assert best.seconds <= change.seconds


def test_a_whole_run_is_so_many_steps(on_512):
    lines = run_lines(on_512, H100, tokens=4.9e12, days=23.0)
    seconds = step_time(on_512, H100).seconds
    num_steps = 1_168_252  # 4.9e12 / (1,024 windows of 4,096), rounded up
    row = next(line for line in lines if f"this plan, {num_steps:,} steps" in line)
    assert f"{num_steps * seconds / 86_400:,.1f}" in row
    assert any("23.0" in line and "4,816" in line and "20.6%" in line for line in lines)
    assert run_lines(on_512, H100, tokens=0.0, days=0.0) == []


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (1023, "1,023 B"), (2048, "2.00 KiB"), (83_746_306_688, "77.99 GiB"),
     (2**52, "4,096.00 TiB")],
)  # fmt: skip
def test_bytes_are_written_in_units_of_1024(size, words):
    assert in_words(size) == words
