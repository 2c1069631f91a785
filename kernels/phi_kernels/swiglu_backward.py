"""Backward of the second product and of SwiGLU: from dy to the gradient of gate and up.

For row n of token t with weight w: dact = dy_t W2, and in the epilogue of that product

    act = silu(gate) * up          dw = <dact, act>, so the experts' outputs need not be kept
    dup = w dact silu(gate)        dgate = w dact up s (1 + gate (1 - s)),  s = sigmoid(gate)

and w * act, which the gradient of W2 multiplies by dy. The index arrays are those of
phi_kernels/gate_up.py.
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

# Gate, up and what is made of them beside 128 accumulators a thread: 64 columns at a time spill.
# For the same reason what does not depend on the tile stays inside the loop (disable_licm).
_EPILOGUE_COLUMNS = 32


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_bwd_kernel(
    grad_ptr,  # (T, D), gradient of y
    weight_ptr,  # (T * K,) float32, by slot
    slot_of_row_ptr,  # (N,)
    down_desc,  # (E, D, F), boxes of (1, BLOCK_D, BLOCK_F)
    hidden_ptr,  # (N, 2F)
    offset_ptr,  # (E,)
    expert_of_tile_ptr,  # (M,)
    first_row_of_tile_ptr,  # (M,)
    num_tiles_ptr,  # (1,)
    grad_hidden_ptr,  # (N, 2F)
    weighted_act_ptr,  # (N, F)
    part_ptr,  # (ceil(F / BLOCK_F), N) float32, the column tiles' shares of dw
    num_rows,
    D_units,  # of 16 bytes, so that the compiler knows how rows are aligned
    F_units,
    TOP_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    UNIT: tl.constexpr,
    MOST_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (programs,): each owns every num_programs-th tile of BLOCK_N rows x BLOCK_F columns."""
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
        slot = tl.load(slot_of_row_ptr + offs_n, mask=mask_n, other=0)
        offs_d = tl.arange(0, BLOCK_D)
        grad_ptrs = grad_ptr + (slot // TOP_K)[:, None] * D + offs_d[None, :]
        first_f = column_tile * BLOCK_F

        acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        for d in tl.range(0, D, BLOCK_D, num_stages=NUM_STAGES):
            mask = mask_n[:, None] if EVEN_D else mask_n[:, None] & (offs_d < D - d)[None, :]
            grad = tl.load(grad_ptrs + d, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
            down = down_desc.load([expert, d, first_f]).reshape(BLOCK_D, BLOCK_F)
            acc = tl.dot(grad, down, acc, input_precision="ieee")

        weight = tl.load(weight_ptr + slot, mask=mask_n, other=0.0)
        # the tile's corner in 64 bits; within a tile 32 bits are enough
        corner = first_row.to(tl.int64) * F
        share = _swiglu_bwd_columns(
            acc, weight, mask_n, 0, F - first_f, F, hidden_ptr + 2 * corner + first_f,
            grad_hidden_ptr + 2 * corner + first_f, weighted_act_ptr + corner + first_f,
            MOST_COLUMNS,
        )  # fmt: skip
        part_ptrs = part_ptr + column_tile.to(tl.int64) * num_rows + offs_n
        tl.store(part_ptrs, share, mask=mask_n)


@triton.jit
def _swiglu_bwd_columns(
    dact, weight, mask_n, first_f, num_columns, F, hidden_ptr, grad_hidden_ptr, weighted_act_ptr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradient of hidden and of w * act; return its share of dw.

    The pointers are those of the tile's corner. MOST columns at a time, so that the epilogue fits
    the registers beside the accumulator.
    """
    COLUMNS: tl.constexpr = dact.shape[1]
    if COLUMNS > MOST:
        left, right = left_and_right(dact)
        share = _swiglu_bwd_columns(
            left, weight, mask_n, first_f, num_columns, F, hidden_ptr, grad_hidden_ptr,
            weighted_act_ptr, MOST,
        )  # fmt: skip
        share += _swiglu_bwd_columns(
            right, weight, mask_n, first_f + COLUMNS // 2, num_columns, F, hidden_ptr,
            grad_hidden_ptr, weighted_act_ptr, MOST,
        )  # fmt: skip
    else:
        offs_n = tl.arange(0, dact.shape[0])[:, None]
        offs_f = first_f + tl.arange(0, COLUMNS)[None, :]
        mask = mask_n[:, None] & (offs_f < num_columns)
        hidden_offs = offs_n * (2 * F) + offs_f
        dtype: tl.constexpr = hidden_ptr.dtype.element_ty
        gate = tl.load(hidden_ptr + hidden_offs, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(hidden_ptr + F + hidden_offs, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        # rounded as the forward pass rounded it
        act = (silu * up).to(dtype).to(tl.float32)
        share = tl.sum(dact * act, axis=1)
        weighted_act = (weight[:, None] * act).to(dtype)
        tl.store(weighted_act_ptr + offs_n * F + offs_f, weighted_act, mask=mask)
        dact = weight[:, None] * dact
        grad_up = dact * silu
        grad_gate = dact * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(grad_hidden_ptr + hidden_offs, grad_gate.to(dtype), mask=mask)
        tl.store(grad_hidden_ptr + F + hidden_offs, grad_up.to(dtype), mask=mask)
    return share


def launch_swiglu_backward(
    grad_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    hidden_NH: Tensor,
    down_EDF: Tensor,
    *,
    tiles: TileTable,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return grad_hidden_NH, weighted_act_NF and grad_weight_TK (float32)."""
    d, f = down_EDF.shape[1:]
    num_rows, unit = len(hidden_NH), 16 // grad_TD.element_size()
    grad_hidden_NH = hidden_NH.new_empty(hidden_NH.shape)
    weighted_act_NF = hidden_NH.new_empty(num_rows, f)
    part_JN = weight_TK.new_empty(-(-f // tile.columns), num_rows)
    _swiglu_bwd_kernel[(tile.programs * num_multiprocessors(grad_TD),)](
        grad_TD, weight_TK, plan.slot_of_row_N,
        TensorDescriptor.from_tensor(down_EDF, [1, tile.reduction, tile.columns]),
        hidden_NH, plan.offset_E, *tiles, grad_hidden_NH, weighted_act_NF, part_JN, num_rows,
        d // unit, f // unit,
        TOP_K=plan.top_k, EVEN_D=d % tile.reduction == 0, UNIT=unit,
        MOST_COLUMNS=_EPILOGUE_COLUMNS,
        BLOCK_N=tile.rows, BLOCK_F=tile.columns, BLOCK_D=tile.reduction, GROUP=tile.group,
        NUM_STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    grad_weight_TK = part_JN.sum(dim=0)[plan.row_of_slot_TK]
    return grad_hidden_NH, weighted_act_NF, grad_weight_TK
