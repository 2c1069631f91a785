"""Memory formulas worked by hand for Phi-3.5-MoE; real tensors are in test_on_ranks.py."""

from __future__ import annotations

import dataclasses
import os

import pytest

from moe.plan.activations import kept_activations
from moe.plan.held import held_groups, partition_elements
from moe.plan.memory import rank_memory, state_bytes

PARAMETERS = 41_873_153_344
EXPERTS = 32 * 16 * 78_643_200


def test_one_rank_that_holds_all_needs_16_bytes_a_parameter(on_512):
    alone = dataclasses.replace(
        on_512, world_size=1, expert_parallel_size=1, zero_stage=0, activation_checkpointing=False
    )
    memory = rank_memory(alone)
    assert memory.state == {
        "parameters": 4 * PARAMETERS,
        "Adam's moments": 8 * PARAMETERS,
    }
    assert memory.moments["optimiser steps"] == 4 * PARAMETERS


def test_zero_cuts_what_it_says_it_cuts(on_512):
    held = PARAMETERS - EXPERTS * 7 // 8
    shared, experts = PARAMETERS - EXPERTS, EXPERTS // 8
    part = shared / 512 + experts / 64
    expected = {
        1: {"parameters": 4 * held, "masters": 4 * part, "Adam's moments": 8 * part},
        2: {"parameters": 4 * held, "masters": 4 * part, "Adam's moments": 8 * part},
        3: {"parameters": 4 * part, "masters": 4 * part, "Adam's moments": 8 * part},
    }
    for stage, sizes in expected.items():
        state, _ = state_bytes(dataclasses.replace(on_512, zero_stage=stage))
        for kind, size in sizes.items():
            assert state[kind] == pytest.approx(size, rel=1e-5), (stage, kind)


def test_bfloat16_parameters_halve_parameters_not_the_optimiser(on_512):
    wide, _ = state_bytes(dataclasses.replace(on_512, zero_stage=2))
    narrow, _ = state_bytes(dataclasses.replace(on_512, zero_stage=2, bf16_parameters=True))
    assert narrow["parameters"] == wide["parameters"] // 2
    assert narrow["masters"] == wide["masters"]
    assert narrow["Adam's moments"] == wide["Adam's moments"]


def test_an_offloaded_optimiser_is_on_the_host(on_512):
    state, host = state_bytes(dataclasses.replace(on_512, zero_stage=3, offload_optimizer=True))
    part = sum(
        partition_elements(dataclasses.replace(on_512, zero_stage=3), group)
        for group in held_groups(on_512)
    )
    assert "masters" not in state
    assert "Adam's moments" not in state
    assert host == (4 + 8 + 4 + 4) * part


def test_recomputing_experts_keeps_their_input_alone(on_512):
    whole = dataclasses.replace(on_512, activation_checkpointing=False, expert_parallel_size=1)
    less = dataclasses.replace(whole, experts=dataclasses.replace(whole.experts, recompute=True))
    tokens, rows = 4096, 2 * 4096
    assert kept_activations(less)["experts"] == 32 * tokens * 2 * 4096
    saved = kept_activations(whole)["experts"] - kept_activations(less)["experts"]
    assert saved == 32 * rows * 2 * 2 * 6400  # gate and up of every row, in bfloat16


def test_every_choice_that_saves_memory_saves_some(on_512):
    base = dataclasses.replace(
        on_512, zero_stage=1, activation_checkpointing=False, micro_batch_size=2, num_micro=2,
        expert_parallel_size=4,
    )  # fmt: skip
    for changes in (
        {"zero_stage": 2}, {"zero_stage": 3}, {"expert_parallel_size": 8},
        {"activation_checkpointing": True}, {"bf16_parameters": True}, {"offload_optimizer": True},
        {"experts": dataclasses.replace(base.experts, recompute=True)},
        {"micro_batch_size": 1, "num_micro": 4},
    ):  # fmt: skip
        assert rank_memory(dataclasses.replace(base, **changes)).total < rank_memory(base).total, (
            changes
        )


def test_deepspeeds_own_settings_are_those_of_the_layout(on_512):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig()
    assert zero.reduce_bucket_size == on_512.bucket_elements
    assert zero.max_live_parameters == on_512.live_elements
    assert zero.max_reuse_distance == on_512.live_elements
    assert zero.prefetch_bucket_size == on_512.prefetch_elements
    assert zero.use_multi_rank_bucket_allreduce  # why ZeRO 2 sends as much as an all-reduce
