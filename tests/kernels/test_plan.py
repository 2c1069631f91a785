"""Index arrays by hand, by brute force and by invariants: the reference, and the kernels as ops."""

from __future__ import annotations

import phi_kernels
import pytest
import torch
from phi_kernels import DispatchPlan, TileTable, plan, reference
from torch import Tensor


def plan_by_kernels(expert_TK: Tensor, *, num_experts: int) -> DispatchPlan:
    return DispatchPlan(*torch.ops.phi_kernels.make_plan(expert_TK, num_experts))


def tiles_by_kernel(offset_E: Tensor, *, num_rows: int, tile_rows: int) -> TileTable:
    return TileTable(*torch.ops.phi_kernels.make_tiles(offset_E, num_rows, tile_rows))


PLANNERS = {"public": phi_kernels.make_plan, "kernels": plan_by_kernels}
TILERS = {"public": phi_kernels.make_tiles, "kernel": tiles_by_kernel}

# tokens, choices, experts; a block holds 8192 / padded experts slots, 1024 at most
EDGES = {
    "one token": (1, 2, 16),
    "no token": (0, 2, 16),
    "one expert": (9, 1, 1),
    "k = 1": (40, 1, 7),
    "k = e, no power of two": (6, 5, 5),
    "one slot less than a block": (511, 1, 16),
    "exactly a block": (256, 2, 16),
    "one slot more than a block": (513, 1, 16),
    "more experts than slots": (3, 2, 300),
    "experts that are no power of two, several blocks": (300, 3, 20),
    "more parts than the scan takes at a time": (1030, 4, 128),
}


def draw_choices(edge: str) -> Tensor:
    num_tokens, top_k, num_experts = EDGES[edge]
    generator = torch.Generator().manual_seed(num_tokens)
    score_TE = torch.rand(num_tokens, num_experts, generator=generator)
    # squared ranks: the last experts get most, some of the first none
    return score_TE.mul_(torch.arange(1, num_experts + 1) ** 2).topk(top_k, dim=1).indices


def expected_plan(expert_TK: Tensor, num_experts: int) -> DispatchPlan:
    """By Python's sort, which is stable."""
    expert_N = expert_TK.flatten().tolist()
    slot_of_row = sorted(range(len(expert_N)), key=lambda slot: expert_N[slot])
    row_of_slot = {slot: row for row, slot in enumerate(slot_of_row)}
    return DispatchPlan(
        torch.tensor(slot_of_row, dtype=torch.int64),
        torch.tensor([row_of_slot[s] for s in range(len(expert_N))], dtype=torch.int64).view(
            expert_TK.shape
        ),
        torch.tensor(
            [sum(e <= last for e in expert_N) for last in range(num_experts)], dtype=torch.int32
        ),
    )


def expected_tiles(offset_E: list[int], tile_rows: int) -> list[tuple[int, int]]:
    """(expert, first row) of every tile."""
    tiles, start = [], 0
    for expert, end in enumerate(offset_E):
        tiles += [(expert, row) for row in range(start, end, tile_rows)]
        start = end
    return tiles


def assert_equal(got, expected) -> None:
    for name, a, b in zip(got._fields, got, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("made_by", PLANNERS)
def test_a_plan_worked_by_hand(made_by):
    plan = PLANNERS[made_by](torch.tensor([[1, 0], [2, 1], [0, 2]]), num_experts=4)
    # slots: token 0 -> 0, 1; token 1 -> 2, 3; token 2 -> 4, 5; expert 3 is empty
    assert plan.slot_of_row_N.tolist() == [1, 4, 0, 3, 2, 5]
    assert plan.row_of_slot_TK.tolist() == [[2, 0], [4, 3], [1, 5]]
    assert plan.offset_E.tolist() == [2, 4, 6, 6]
    assert plan.token_of_row_N().tolist() == [0, 2, 0, 1, 1, 2]


@pytest.mark.parametrize("made_by", PLANNERS)
@pytest.mark.parametrize("edge", EDGES)
def test_rows_are_the_slots_in_a_stable_order_of_experts(made_by, edge, poisoned):
    expert_TK, num_experts = draw_choices(edge), EDGES[edge][2]
    made = PLANNERS[made_by](expert_TK, num_experts=num_experts)
    assert_equal(made, expected_plan(expert_TK, num_experts))


@pytest.mark.parametrize("made_by", PLANNERS)
@pytest.mark.parametrize(
    "choices",
    [
        [[1, 1]] * 300,  # all on one expert, both choices too, beyond a block; the others empty
        [[0, 3]] * 7,  # first and last expert only
        [[3]] * 1025,  # the last expert only
    ],
)
def test_uneven_choices_give_a_stable_plan(made_by, choices, poisoned):
    expert_TK = torch.tensor(choices)
    assert_equal(PLANNERS[made_by](expert_TK, num_experts=4), expected_plan(expert_TK, 4))


def test_a_part_of_several_blocks_carries_its_ranks_on(monkeypatch, poisoned):
    monkeypatch.setattr(plan, "_MOST_PARTS", 3)  # as with 32,769 slots of 128 experts
    expert_TK = draw_choices("more parts than the scan takes at a time")[:250]
    assert_equal(plan_by_kernels(expert_TK, num_experts=128), expected_plan(expert_TK, 128))


def test_choices_may_be_int32_and_strided(poisoned):
    expert_TK = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]])
    strided_TK = expert_TK.int()[:, ::2]
    assert not strided_TK.is_contiguous()
    made = plan_by_kernels(strided_TK, num_experts=3)
    assert_equal(made, expected_plan(expert_TK[:, ::2], 3))


def test_a_permuted_batch_has_the_same_rows_for_each_expert_in_its_own_order():
    expert_TK = draw_choices("experts that are no power of two, several blocks")
    new_of_old_T = torch.randperm(len(expert_TK), generator=torch.Generator().manual_seed(0))
    permuted_TK = torch.empty_like(expert_TK)
    permuted_TK[new_of_old_T] = expert_TK
    before = plan_by_kernels(expert_TK, num_experts=20)
    after = plan_by_kernels(permuted_TK, num_experts=20)
    assert torch.equal(before.offset_E, after.offset_E)
    start = 0
    for end in before.offset_E.tolist():
        moved = new_of_old_T[before.token_of_row_N()[start:end]].sort().values
        assert torch.equal(after.token_of_row_N()[start:end], moved)
        start = end


def test_two_plans_of_one_routing_are_equal():
    expert_TK = draw_choices("experts that are no power of two, several blocks")
    assert_equal(*(plan_by_kernels(expert_TK, num_experts=20) for _ in range(2)))


@pytest.mark.parametrize("made_by", TILERS)
def test_tiles_worked_by_hand(made_by):
    # rows 0-4, none, 5-12, 13: tiles of four rows
    offset_E = torch.tensor([5, 5, 13, 14], dtype=torch.int32)
    tiles = TILERS[made_by](offset_E, num_rows=14, tile_rows=4)
    assert tiles.num_tiles_1.tolist() == [5]
    assert tiles.expert_of_tile_M.tolist() == [0, 0, 2, 2, 3, 0, 0, 0]  # M = 4 + 4
    assert tiles.first_row_of_tile_M.tolist() == [0, 4, 5, 9, 13, 0, 0, 0]


@pytest.mark.parametrize("made_by", TILERS)
@pytest.mark.parametrize("tile_rows", [64, 128])
@pytest.mark.parametrize(
    "rows",
    [
        [0, 0, 0],  # no row at all
        [1],  # one row, one expert
        [64, 63, 65, 128, 127, 129],  # around the heights
        [0, 700, 0, 0, 0],  # all on one expert
        [1] * 300,  # the table's whole length is used; longer than the 32 entries of a program
    ],
)
def test_tiles_cover_every_row_once_and_cross_no_expert(made_by, tile_rows, rows, poisoned):
    offset_E = torch.tensor(rows).cumsum(0).int()
    tiles = TILERS[made_by](offset_E, num_rows=sum(rows), tile_rows=tile_rows)
    expected = expected_tiles(offset_E.tolist(), tile_rows)
    num_entries = -(-sum(rows) // tile_rows) + len(rows)
    assert len(expected) <= num_entries
    expected += [(0, 0)] * (num_entries - len(expected))
    assert [tensor.dtype for tensor in tiles] == [torch.int32] * 3
    pairs = zip(tiles.expert_of_tile_M.tolist(), tiles.first_row_of_tile_M.tolist(), strict=True)
    assert list(pairs) == expected
    assert tiles.num_tiles_1.tolist() == [len(expected_tiles(offset_E.tolist(), tile_rows))]


def test_the_ops_follow_the_rules_of_torch_library():
    expert_TK = torch.tensor([[1, 0], [2, 1], [0, 2]])
    offset_E = reference.make_plan(expert_TK, num_experts=3).offset_E
    torch.library.opcheck(torch.ops.phi_kernels.make_plan, (expert_TK, 3))
    torch.library.opcheck(torch.ops.phi_kernels.make_tiles, (offset_E, 6, 64))


def test_plan_and_tiles_are_traced_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(expert_TK):
        made = plan_by_kernels(expert_TK, num_experts=5)
        return made, tiles_by_kernel(made.offset_E, num_rows=expert_TK.numel(), tile_rows=64)

    for num_tokens in (7, 90):  # the second length is not traced again
        expert_TK = torch.arange(2 * num_tokens).view(num_tokens, 2) * 7 % 5
        made, tiles = compiled(expert_TK)
        expected = expected_plan(expert_TK, 5)
        assert_equal(made, expected)
        assert_equal(
            tiles,
            reference.make_tiles(expected.offset_E, num_rows=2 * num_tokens, tile_rows=64),
        )
