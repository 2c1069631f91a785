"""First product of the experts with SwiGLU: hidden = x W13^T, act = silu(gate) * up.

Rows are read where the tokens are, so no permuted copy of x exists.

| index array | shape | from | meaning |
|---|---|---|---|
| slot_of_row_N | (N,) int64 | plan | slot t * K + k that a row copies |
| offset_E | (E,) int32 | plan | end of each expert's rows |
| expert_of_tile_M | (M,) int32 | tiles | expert of a row tile |
| first_row_of_tile_M | (M,) int32 | tiles | its first row; its last is below offset_E[expert] |
| num_tiles_1 | (1,) int32 | tiles | row tiles in use, at most M |
"""

# what @triton.jit makes of a function has no types
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from phi_kernels.dispatch_plan import DispatchPlan, TileTable
from phi_kernels.tile_order import left_and_right, tile_at
from phi_kernels.triton_device import num_multiprocessors
from phi_kernels.tuning import Tile

# of gate and of up at a time: with more the activation beside them spills on sm_100
_EPILOGUE_COLUMNS = 64


@triton.jit
def _gate_up_fwd_kernel(
    x_ptr,  # (T, D)
    slot_of_row_ptr,  # (N,)
    gate_up_desc,  # (E, 2, F, D), boxes of (1, 2, BLOCK_F, BLOCK_D)
    offset_ptr,  # (E,)
    expert_of_tile_ptr,  # (M,)
    first_row_of_tile_ptr,  # (M,)
    num_tiles_ptr,  # (1,)
    hidden_ptr,  # (N, 2F)
    act_ptr,  # (N, F)
    D_units,  # of 16 bytes, so that the compiler knows how rows are aligned
    F_units,
    TOP_K: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    HAS_ACT: tl.constexpr,
    EVEN_D: tl.constexpr,
    UNIT: tl.constexpr,
    MOST_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (programs,): each owns every num_programs-th tile of BLOCK_N rows x BLOCK_F columns.

    Reads BLOCK_N tokens and both halves of an expert's weight; writes gate and up of hidden, and
    act. Gate and up come from one product with 2 * BLOCK_F columns: the box holds both.
    """
    D, F = D_units * UNIT, F_units * UNIT
    num_row_tiles = tl.load(num_tiles_ptr)
    num_column_tiles = tl.cdiv(F, BLOCK_F)
    num_tiles = num_row_tiles * num_column_tiles
    for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), disable_licm=True):
        row_tile, column_tile = tile_at(index, num_row_tiles, num_column_tiles, GROUP)
        expert = tl.load(expert_of_tile_ptr + row_tile)
        first_row = tl.load(first_row_of_tile_ptr + row_tile)
        offs_n = first_row + tl.arange(0, BLOCK_N)
        mask_n = offs_n < tl.load(offset_ptr + expert)
        token = tl.load(slot_of_row_ptr + offs_n, mask=mask_n, other=0) // TOP_K
        offs_d = tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + token[:, None] * D + offs_d[None, :]
        first_f = column_tile * BLOCK_F

        acc = tl.zeros((BLOCK_N, 2 * BLOCK_F), tl.float32)
        for d in tl.range(0, D, BLOCK_D, num_stages=NUM_STAGES):
            mask = mask_n[:, None] if EVEN_D else mask_n[:, None] & (offs_d < D - d)[None, :]
            x = tl.load(x_ptrs + d, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
            weight = gate_up_desc.load([expert, 0, first_f, d]).reshape(2 * BLOCK_F, BLOCK_D)
            acc = tl.dot(x, weight.T, acc, input_precision="ieee")

        gate, up = left_and_right(acc)
        # the tile's corner in 64 bits; within a tile 32 bits are enough
        corner = first_row.to(tl.int64) * F
        _write_columns(
            gate, up, mask_n, 0, F - first_f, F, hidden_ptr + 2 * corner + first_f,
            act_ptr + corner + first_f, HAS_HIDDEN, HAS_ACT, MOST_COLUMNS,
        )  # fmt: skip


@triton.jit
def _write_columns(
    gate, up, mask_n, first_f, num_columns, F, hidden_ptr, act_ptr, HAS_HIDDEN: tl.constexpr,
    HAS_ACT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Write a tile of hidden and of act, MOST columns at a time; pointers of the tile's corner."""
    COLUMNS: tl.constexpr = gate.shape[1]
    if COLUMNS > MOST:
        gate, right_gate = left_and_right(gate)
        up, right_up = left_and_right(up)
        _write_columns(
            gate, up, mask_n, first_f, num_columns, F, hidden_ptr, act_ptr, HAS_HIDDEN, HAS_ACT,
            MOST,
        )  # fmt: skip
        _write_columns(
            right_gate, right_up, mask_n, first_f + COLUMNS // 2, num_columns, F, hidden_ptr,
            act_ptr, HAS_HIDDEN, HAS_ACT, MOST,
        )  # fmt: skip
    else:
        dtype: tl.constexpr = act_ptr.dtype.element_ty
        # rounded before the activation: the backward pass reads these numbers
        gate, up = gate.to(dtype), up.to(dtype)
        offs_n = tl.arange(0, gate.shape[0])[:, None]
        offs_f = first_f + tl.arange(0, COLUMNS)[None, :]
        mask = mask_n[:, None] & (offs_f < num_columns)
        if HAS_HIDDEN:
            hidden_offs = offs_n * (2 * F) + offs_f
            tl.store(hidden_ptr + hidden_offs, gate, mask=mask)
            tl.store(hidden_ptr + F + hidden_offs, up, mask=mask)
        if HAS_ACT:
            gate32 = gate.to(tl.float32)
            act = gate32 * tl.sigmoid(gate32) * up.to(tl.float32)
            tl.store(act_ptr + offs_n * F + offs_f, act.to(dtype), mask=mask)


def launch_gate_up(
    x_TD: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    *,
    tiles: TileTable,
    tile: Tile,
    needs_hidden: bool,
    needs_act: bool,
) -> tuple[Tensor, Tensor]:
    """Return hidden_NH and act_NF, without rows where they are not needed."""
    num_experts, h, d = gate_up_EHD.shape
    num_rows, f = plan.slot_of_row_N.numel(), h // 2
    hidden_NH = x_TD.new_empty(num_rows if needs_hidden else 0, h)
    act_NF = x_TD.new_empty(num_rows if needs_act else 0, f)
    block_f, unit = tile.columns // 2, 16 // x_TD.element_size()
    gate_up_desc = TensorDescriptor(
        gate_up_EHD, [num_experts, 2, f, d], [h * d, f * d, d, 1], [1, 2, block_f, tile.reduction]
    )
    _gate_up_fwd_kernel[(tile.programs * num_multiprocessors(x_TD),)](
        x_TD, plan.slot_of_row_N, gate_up_desc, plan.offset_E, *tiles, hidden_NH, act_NF,
        d // unit, f // unit,
        TOP_K=plan.top_k, HAS_HIDDEN=needs_hidden, HAS_ACT=needs_act,
        EVEN_D=d % tile.reduction == 0, UNIT=unit, MOST_COLUMNS=_EPILOGUE_COLUMNS,
        BLOCK_N=tile.rows, BLOCK_F=block_f, BLOCK_D=tile.reduction, GROUP=tile.group,
        NUM_STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    return hidden_NH, act_NF
