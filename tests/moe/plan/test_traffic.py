"""Bytes sent, worked by hand; bytes on a real wire are in test_on_ranks.py."""

from __future__ import annotations

import dataclasses

import pytest

from moe.plan.traffic import rank_traffic

SHARED = 41_873_153_344 - 32 * 16 * 78_643_200
EXPERTS = 32 * 2 * 78_643_200  # of a rank, with 8 ranks a group


def test_one_process_sends_nothing(on_512):
    alone = dataclasses.replace(on_512, world_size=1, expert_parallel_size=1)
    assert rank_traffic(alone) == {}


def test_gradients_take_an_all_reduce_over_those_that_hold_the_same(on_512):
    table = rank_traffic(on_512)
    shared, experts = table["gradients, shared"], table["gradients, experts"]
    assert shared.total == pytest.approx(4 * SHARED * 2 * 511 / 512, rel=1e-6)
    assert experts.total == pytest.approx(4 * EXPERTS * 2 * 63 / 64, rel=1e-6)
    # eight ranks of a node share one crossing; the owners of an expert are all on other nodes
    assert shared.between == pytest.approx(shared.total / 8, rel=1e-6)
    assert experts.inside == 0


def test_rows_cross_with_the_chance_that_their_expert_is_elsewhere(on_512):
    rows = rank_traffic(on_512)["expert rows"]
    per_pass = 2 * 2 * 4096 * 4096 * (2 + 2) * 32 * 7 // 8  # 2 micro-batches, 2 choices
    assert rows.total == 3 * per_pass  # forward, again, backward
    assert rows.between == 0
    assert rows.num_calls == 2 * 3 * 32 * 2
    once = dataclasses.replace(on_512, activation_checkpointing=False)
    assert rank_traffic(once)["expert rows"].total == 2 * per_pass
    over_nodes = dataclasses.replace(once, expert_parallel_size=16)
    crossing = rank_traffic(over_nodes)["expert rows"]
    assert crossing.between * 7 == crossing.inside * 8


def test_zero_2_and_3_reduce_after_every_micro_batch(on_512):
    def gradients(stage: int) -> int:
        table = rank_traffic(dataclasses.replace(on_512, zero_stage=stage))
        return table["gradients, experts"].total

    assert gradients(0) == gradients(1)
    assert gradients(2) == pytest.approx(2 * gradients(1), rel=1e-6)
    assert gradients(3) == pytest.approx(gradients(1), rel=1e-6)  # half of it, twice


def test_zero_3_gathers_twice_what_does_not_stay(on_512):
    sent = rank_traffic(dataclasses.replace(on_512, zero_stage=3))["gathered parameters"]
    whole = 511 / 512 * SHARED + 63 / 64 * EXPERTS
    share = 1 - 1e9 / (SHARED + EXPERTS)
    assert sent.total == pytest.approx(2 * 4 * whole * (1 + share), rel=1e-4)
    stays = dataclasses.replace(on_512, zero_stage=3, live_elements=10**12)
    assert rank_traffic(stays)["gathered parameters"].total == pytest.approx(8 * whole, rel=1e-4)


def test_balance_statistics_travel_only_if_they_are_global(on_512):
    assert rank_traffic(on_512)["balance statistics"].num_calls == 64
    router = dataclasses.replace(on_512.router, balance_scope="local")
    local = dataclasses.replace(on_512, router=router)
    assert "balance statistics" not in rank_traffic(local)
