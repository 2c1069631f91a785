"""Sorts the slots of a routing by expert, and cuts the sorted rows into tiles, on the device.

A stable counting sort in three kernels; a program owns a part, a run of slots one after another:

    count_PE    (P, E) int32  slots of each part on each expert           histogram -> scan
    row_PE      (P, E) int32  row of a part's first slot on each expert   scan -> place
    offset_E, slot_of_row_N, row_of_slot_TK                               of dispatch_plan.py

The counts of a block of slots are sums of one-hot rows, its ranks their running sums: no atomic
additions, so equal from run to run. No value is read on the host and no grid depends on one. Sizes
that follow the number of tokens are not specialised on: a new length compiles nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi_kernels import reference
from phi_kernels.differentiation import is_transformed
from phi_kernels.dispatch_plan import DispatchPlan, TileTable
from phi_kernels.triton_device import on_its_device, runs_triton

_NUM_WARPS = 8
_ELEMENTS = 8192  # of a one-hot block: 32 integers a thread, so that its running sum fits beside it
_MOST_SLOTS = 1024  # of a block with few experts
_FEWEST_SLOTS = 16
_MOST_PARTS = 512  # what one program scans; a few for each of a GPU's multiprocessors


@triton.jit(do_not_specialize=["num_slots", "part_slots"])
def _plan_histogram_kernel(
    expert_ptr, count_ptr, num_slots, part_slots, E: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (P,): a program reads the experts of its part and writes its row of count_PE."""
    part = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, E_PADDED)
    count_e = tl.zeros([E_PADDED], tl.int32)
    for start in range(0, part_slots, BLOCK):
        offs_slot = part * part_slots + start + tl.arange(0, BLOCK)
        # -1 is no expert; part_slots is a multiple of BLOCK, so only the end needs a mask
        expert = tl.load(expert_ptr + offs_slot, mask=offs_slot < num_slots, other=-1).to(tl.int32)
        count_e += tl.sum((expert[:, None] == offs_e[None, :]).to(tl.int32), axis=0)
    tl.store(count_ptr + part * E + offs_e, count_e, mask=offs_e < E)


@triton.jit(do_not_specialize=["num_parts"])
def _plan_scan_kernel(
    count_ptr, row_ptr, offset_ptr, num_parts, E: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (1,): reads count_PE, writes offset_E and row_PE; BLOCK parts at a time."""
    offs_e = tl.arange(0, E_PADDED)
    total_e = tl.zeros([E_PADDED], tl.int32)
    for start in range(0, num_parts, BLOCK):
        offs_part = start + tl.arange(0, BLOCK)
        offs = offs_part[:, None].to(tl.int64) * E + offs_e[None, :]
        mask = (offs_part[:, None] < num_parts) & (offs_e[None, :] < E)
        total_e += tl.sum(tl.load(count_ptr + offs, mask=mask, other=0), axis=0)
    end_e = tl.cumsum(total_e, axis=0)
    tl.store(offset_ptr + offs_e, end_e, mask=offs_e < E)
    row_e = end_e - total_e
    for start in range(0, num_parts, BLOCK):
        offs_part = start + tl.arange(0, BLOCK)
        offs = offs_part[:, None].to(tl.int64) * E + offs_e[None, :]
        mask = (offs_part[:, None] < num_parts) & (offs_e[None, :] < E)
        count = tl.load(count_ptr + offs, mask=mask, other=0)
        before = tl.cumsum(count, axis=0) - count
        tl.store(row_ptr + offs, row_e[None, :] + before, mask=mask)
        row_e += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["num_slots", "part_slots"])
def _plan_place_kernel(
    expert_ptr, row_ptr, slot_of_row_ptr, row_of_slot_ptr, num_slots, part_slots,
    E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (P,): a program reads its part's experts and row of row_PE, writes both maps."""
    part = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, E_PADDED)
    row_e = tl.load(row_ptr + part * E + offs_e, mask=offs_e < E, other=0)
    for start in range(0, part_slots, BLOCK):
        offs_slot = part * part_slots + start + tl.arange(0, BLOCK)
        mask = offs_slot < num_slots
        expert = tl.load(expert_ptr + offs_slot, mask=mask, other=-1).to(tl.int32)
        is_on = (expert[:, None] == offs_e[None, :]).to(tl.int32)
        before = tl.cumsum(is_on, axis=0) - is_on
        row = tl.sum(is_on * (before + row_e[None, :]), axis=1).to(tl.int64)
        tl.store(slot_of_row_ptr + row, offs_slot, mask=mask)
        tl.store(row_of_slot_ptr + offs_slot, row, mask=mask)
        row_e += tl.sum(is_on, axis=0)


@triton.jit(do_not_specialize=["num_entries"])
def _tiles_kernel(
    offset_ptr, expert_of_tile_ptr, first_row_ptr, num_tiles_ptr, num_entries, tile_rows,
    E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (M / BLOCK,): a program reads offset_E and writes BLOCK entries; the first, their count.

    Every program makes the running sum of tiles over experts again: E numbers.
    """
    offs_e = tl.arange(0, E_PADDED)
    mask_e = offs_e < E
    end_e = tl.load(offset_ptr + offs_e, mask=mask_e, other=0)
    start_e = tl.load(offset_ptr + offs_e - 1, mask=mask_e & (offs_e > 0), other=0)
    tiles_e = tl.where(mask_e, (end_e - start_e + tile_rows - 1) // tile_rows, 0)
    last_e = tl.cumsum(tiles_e, axis=0)
    num_tiles = tl.sum(tiles_e, axis=0)
    offs_tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = offs_tile[:, None]
    is_of = (tile < last_e[None, :]) & (tile >= (last_e - tiles_e)[None, :])
    row = start_e[None, :] + (tile - (last_e - tiles_e)[None, :]) * tile_rows
    mask = offs_tile < num_entries
    expert_of_tile = tl.sum(tl.where(is_of, offs_e[None, :], 0), axis=1)
    tl.store(expert_of_tile_ptr + offs_tile, expert_of_tile, mask=mask)
    tl.store(first_row_ptr + offs_tile, tl.sum(tl.where(is_of, row, 0), axis=1), mask=mask)
    if tl.program_id(0) == 0:
        tl.store(num_tiles_ptr, num_tiles)


@on_its_device
def launch_make_plan(expert_TK: Tensor, num_experts: int) -> DispatchPlan:
    """Three kernels; reads no value, so tensors on meta do for a compiler without a device."""
    num_slots = expert_TK.numel()
    padded = _padded(num_experts)
    block = _block(padded)
    blocks_a_part = max(1, -(-num_slots // (block * _MOST_PARTS)))
    part_slots = block * blocks_a_part
    num_parts = max(1, -(-num_slots // part_slots))
    expert_TK = expert_TK.contiguous()
    plan = _empty_plan(expert_TK, num_experts)
    count_PE, row_PE = (
        torch.empty((num_parts, num_experts), dtype=torch.int32, device=expert_TK.device)
        for _ in range(2)
    )
    sizes: dict[str, Any] = {
        "E": num_experts,
        "E_PADDED": padded,
        "BLOCK": block,
        "num_warps": _NUM_WARPS,
    }
    _plan_histogram_kernel[(num_parts,)](expert_TK, count_PE, num_slots, part_slots, **sizes)
    _plan_scan_kernel[(1,)](count_PE, row_PE, plan.offset_E, num_parts, **sizes)
    _plan_place_kernel[(num_parts,)](
        expert_TK, row_PE, plan.slot_of_row_N, plan.row_of_slot_TK, num_slots, part_slots, **sizes
    )
    return plan


@on_its_device
def launch_make_tiles(offset_E: Tensor, num_rows: int, tile_rows: int) -> TileTable:
    """One kernel; reads no value."""
    tiles = _empty_tiles(offset_E, num_rows, tile_rows)
    (num_experts,), (num_entries,) = offset_E.shape, tiles.expert_of_tile_M.shape
    padded = _padded(num_experts)
    block = _block(padded)
    sizes: dict[str, Any] = {
        "E": num_experts,
        "E_PADDED": padded,
        "BLOCK": block,
        "num_warps": _NUM_WARPS,
    }
    _tiles_kernel[(triton.cdiv(num_entries, block),)](
        offset_E.contiguous(), *tiles, num_entries, tile_rows, **sizes
    )
    return tiles


def _padded(num_experts: int) -> int:
    return 1 << (num_experts - 1).bit_length()


def _block(padded_experts: int) -> int:
    return min(_MOST_SLOTS, max(_FEWEST_SLOTS, _ELEMENTS // padded_experts))


def _empty_plan(expert_TK: Tensor, num_experts: int) -> DispatchPlan:
    slot_of_row_N = expert_TK.new_empty(expert_TK.numel(), dtype=torch.int64)
    row_of_slot_TK = expert_TK.new_empty(expert_TK.shape, dtype=torch.int64)
    return DispatchPlan(
        slot_of_row_N, row_of_slot_TK, expert_TK.new_empty(num_experts, dtype=torch.int32)
    )


def _empty_tiles(offset_E: Tensor, num_rows: int, tile_rows: int) -> TileTable:
    num_entries = -(-num_rows // tile_rows) + offset_E.shape[0]
    return TileTable(*(offset_E.new_empty(n, dtype=torch.int32) for n in (num_entries,) * 2 + (1,)))


@torch.library.custom_op("phi_kernels::make_plan", mutates_args=())
def _plan_op(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(launch_make_plan(expert_TK, num_experts))  # type: ignore[return-value]


@_plan_op.register_fake
def _(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_empty_plan(expert_TK, num_experts))  # type: ignore[return-value]


@torch.library.custom_op("phi_kernels::make_tiles", mutates_args=())
def _tiles_op(offset_E: Tensor, num_rows: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(launch_make_tiles(offset_E, num_rows, tile_rows))  # type: ignore[return-value]


@_tiles_op.register_fake
def _(offset_E: Tensor, num_rows: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_empty_tiles(offset_E, num_rows, tile_rows))  # type: ignore[return-value]


def make_plan(expert_TK: Tensor, *, num_experts: int) -> DispatchPlan:
    """Sort the T * K slots by expert, equal ones in their order; expert_TK holds 0 to E - 1."""
    if not runs_triton(expert_TK) or is_transformed():
        return reference.make_plan(expert_TK, num_experts=num_experts)
    return DispatchPlan(*_plan_op(expert_TK, num_experts))


def make_tiles(offset_E: Tensor, *, num_rows: int, tile_rows: int) -> TileTable:
    """Cut each expert's rows into tiles of tile_rows, the last of an expert shorter.

    num_rows is offset_E's last entry, known to the host as the length of the rows.
    """
    if not runs_triton(offset_E):
        return reference.make_tiles(offset_E, num_rows=num_rows, tile_rows=tile_rows)
    return TileTable(*_tiles_op(offset_E, num_rows, tile_rows))
