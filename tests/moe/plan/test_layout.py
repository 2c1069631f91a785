"""Which layouts there are, and what is said of those that cannot be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moe.config import DataConfig, LoopConfig, ParallelConfig, TrainConfig
from moe.errors import ConfigError
from moe.plan.held import Group, flat_elements, held_groups, num_held, touched_elements
from moe.plan.layout import layout_of
from moe.plan_config import ClusterConfig, PlanConfig


def test_groups_are_ranks_in_a_row_and_every_so_many(on_512):
    assert list(on_512.expert_group(13)) == [8, 9, 10, 11, 12, 13, 14, 15]
    assert list(on_512.expert_data_group(13))[:3] == [5, 13, 21]
    assert len(on_512.expert_data_group(13)) == on_512.expert_data_size == 64
    assert on_512.num_nodes == 64
    assert on_512.neighbours(on_512.expert_group(0), 0) == 8
    assert on_512.neighbours(on_512.expert_data_group(0), 0) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_parallel_size": 3}, "got 3 with 512 processes.*allowed here: 1, 2, 4, 8, 16"),
        ({"expert_parallel_size": 32}, "got 32 with 16 experts.*allowed here: 1, 2, 4, 8, 16"),
        ({"world_size": 12, "expert_parallel_size": 4}, "processes: got 12 on nodes of 8"),
        ({"seq_len": 8192}, "seq_len: got 8192; model phi35_moe takes at most 4096"),
        ({"zero_stage": 0, "offload_optimizer": True}, "offload_optimizer: got true with.*=0"),
        ({"zero_stage": 0, "bf16_parameters": True}, "bf16_parameters: got true with.*=0"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(on_512, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(on_512, **changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_gpus": 0}, "num_gpus: got 0"),
        ({"batch_size": 12, "num_gpus": 8}, "batch_size: got 12;.*Set batch_size=16"),
        ({"days": 23.0}, "days: got 23.0 without tokens"),
        ({"precision": "float16"}, "precision: got 'float16'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        PlanConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts_fraction": 1.2}, "cluster.experts_fraction: got 1.2; it must be above 0"),
        ({"node_fraction": 0.0}, "cluster.node_fraction: got 0.0"),
        ({"peak_tflops": -1.0}, "cluster.peak_tflops: got -1.0"),
        ({"reserved_gib": 80.0}, "cluster.reserved_gib: got 80.0; it must be below"),
        ({"rates": "hoped"}, "cluster.rates: got 'hoped'; allowed: assumed, measured"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig(**values)


def test_the_layout_of_a_run_is_what_its_configuration_says():
    config = TrainConfig(
        parallel=ParallelConfig(zero_stage=2, expert_parallel_size=4),
        data=DataConfig(seq_len=128),
        train=LoopConfig(batch_size=32, micro_batch_size=2, precision="float32"),
    )
    layout = layout_of(config, world_size=8, gpus_per_node=8)
    assert (layout.num_micro, layout.tokens_of_pass, layout.tokens_of_rank) == (2, 256, 512)
    assert (layout.zero_stage, layout.expert_parallel_size, layout.product_bytes) == (2, 4, 4)


def test_a_rank_holds_its_experts_and_all_of_the_rest(on_512):
    assert num_held(dataclasses.replace(on_512, expert_parallel_size=1)) == 41_873_153_344
    experts = 32 * 16 * 78_643_200  # phi3_family: 3 * 4096 * 6400 an expert
    assert num_held(on_512) == 41_873_153_344 - experts * 7 // 8
    groups = held_groups(on_512)
    assert sum(group.total for group in groups if group.is_expert) == experts // 8


def test_flat_buffers_are_rounded_up_for_equal_parts(on_512):
    for group in held_groups(on_512):
        n = 64 if group.is_expert else 512
        flat = flat_elements(on_512, group)
        assert flat % (2 * n) == 0
        assert 0 <= flat - group.total < 2 * n


def test_a_part_touches_whole_parameters(on_512):
    layout = dataclasses.replace(on_512, world_size=4, expert_parallel_size=1, gpus_per_node=4)
    # 4 parts of 26, of 104 rounded up: the second, 26 to 51, touches the first two
    assert touched_elements(layout, Group(False, (50, 30, 20, 4))) == 80
    # what is one parameter is touched whole by every part
    assert touched_elements(layout, Group(False, (800,))) == 800
