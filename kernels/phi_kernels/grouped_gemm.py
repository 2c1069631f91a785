"""Rows sorted by expert times each expert's matrix: out[n] = rows[n] @ weight[e] or weight[e]^T.

The index arrays are those of the tile table (phi_kernels/gate_up.py has the glossary).
"""

# what @triton.jit makes of a function has no types
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from phi_kernels.dispatch_plan import TileTable
from phi_kernels.tile_order import tile_at
from phi_kernels.triton_device import num_multiprocessors
from phi_kernels.tuning import Tile


@triton.jit
def _grouped_gemm_fwd_kernel(
    rows_desc,  # (N, P), boxes of (BLOCK_N, BLOCK_P)
    weight_desc,  # (E, P, Q), or (E, Q, P) where IS_TRANSPOSED; boxes of one expert
    offset_ptr,  # (E,)
    expert_of_tile_ptr,  # (M,)
    first_row_of_tile_ptr,  # (M,)
    num_tiles_ptr,  # (1,)
    out_ptr,  # (N, Q)
    P,
    Q_units,  # of 16 bytes, so that the compiler knows how rows are aligned
    IS_TRANSPOSED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (programs,): each owns every num_programs-th tile of BLOCK_N rows x BLOCK_Q columns.

    A box of rows may reach into the next expert's: those rows are computed and not written. What
    lies outside the tensors is read as 0, so P and Q need not be multiples of the blocks.
    """
    Q = Q_units * UNIT
    num_row_tiles = tl.load(num_tiles_ptr)
    num_column_tiles = tl.cdiv(Q, BLOCK_Q)
    num_tiles = num_row_tiles * num_column_tiles
    for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), disable_licm=True):
        row_tile, column_tile = tile_at(index, num_row_tiles, num_column_tiles, GROUP)
        expert = tl.load(expert_of_tile_ptr + row_tile)
        first_row = tl.load(first_row_of_tile_ptr + row_tile)
        first_q = column_tile * BLOCK_Q

        acc = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
        for p in tl.range(0, P, BLOCK_P, num_stages=NUM_STAGES):
            rows = rows_desc.load([first_row, p])
            if IS_TRANSPOSED:
                weight = weight_desc.load([expert, first_q, p]).reshape(BLOCK_Q, BLOCK_P).T
            else:
                weight = weight_desc.load([expert, p, first_q]).reshape(BLOCK_P, BLOCK_Q)
            acc = tl.dot(rows, weight, acc, input_precision="ieee")

        offs_n = first_row + tl.arange(0, BLOCK_N)
        offs_q = first_q + tl.arange(0, BLOCK_Q)
        mask = (offs_n < tl.load(offset_ptr + expert))[:, None] & (offs_q < Q)[None, :]
        out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * Q + offs_q[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_grouped_gemm(
    rows_NP: Tensor,
    weight: Tensor,
    offset_E: Tensor,
    *,
    is_transposed: bool,
    tiles: TileTable,
    tile: Tile,
) -> Tensor:
    """Return out (N, Q) for weight (E, P, Q), or (E, Q, P) where is_transposed."""
    p, q = rows_NP.shape[1], weight.shape[1 if is_transposed else 2]
    out_NQ, unit = rows_NP.new_empty(len(rows_NP), q), 16 // rows_NP.element_size()
    box = (tile.columns, tile.reduction) if is_transposed else (tile.reduction, tile.columns)
    _grouped_gemm_fwd_kernel[(tile.programs * num_multiprocessors(rows_NP),)](
        TensorDescriptor.from_tensor(rows_NP, [tile.rows, tile.reduction]),
        TensorDescriptor.from_tensor(weight, [1, *box]),
        offset_E, *tiles, out_NQ, p, q // unit,
        IS_TRANSPOSED=is_transposed, UNIT=unit, BLOCK_N=tile.rows, BLOCK_Q=tile.columns,
        BLOCK_P=tile.reduction, GROUP=tile.group, NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return out_NQ
