"""Gradient of the experts' matrices: grad[e] = left^T right, summed over the rows of expert e.

A grouped product whose reduction is ragged: every expert has its own number of rows. A side is
either one of rows, or one of tokens, whose rows are read where the tokens are. Every tile is summed
by one program in the order of the rows: no atomics, the same bits in every run.
"""

# what @triton.jit makes of a function has no types
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from phi_kernels.dispatch_plan import DispatchPlan
from phi_kernels.tile_order import left_and_right, tile_at
from phi_kernels.triton_device import num_multiprocessors
from phi_kernels.tuning import Tile


@triton.jit
def _weight_gradient_kernel(
    left_ptr,  # (N, P), or (T, P) where LEFT_IS_TOKENS
    right_ptr,  # (N, Q), or (T, Q) where RIGHT_IS_TOKENS
    slot_of_row_ptr,  # (N,)
    offset_ptr,  # (E,)
    grad_ptr,  # (E, P, Q)
    P_units,  # of 16 bytes, so that the compiler knows how rows are aligned
    Q_units,
    num_experts,
    TOP_K: tl.constexpr,
    LEFT_IS_TOKENS: tl.constexpr,
    RIGHT_IS_TOKENS: tl.constexpr,
    IS_ADDED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (programs,): each owns every num_programs-th tile of BLOCK_P x BLOCK_Q of all experts.

    Experts come one after the other, so programs that run together share an expert's rows. An
    expert without rows gets zeros; where IS_ADDED (grad float32) it is left as it is.
    """
    P, Q = P_units * UNIT, Q_units * UNIT
    tiles_of_p = tl.cdiv(P, BLOCK_P)
    tiles_of_q = tl.cdiv(Q, BLOCK_Q)
    tiles_of_expert = tiles_of_p * tiles_of_q
    num_tiles = num_experts * tiles_of_expert
    for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), disable_licm=True):
        expert = index // tiles_of_expert
        tile_p, tile_q = tile_at(index % tiles_of_expert, tiles_of_p, tiles_of_q, GROUP)
        start = tl.load(offset_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(offset_ptr + expert)
        offs_p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
        offs_q = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
        mask_p, mask_q = offs_p < P, offs_q < Q

        acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
        for n in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < end
            row = offs_n.to(tl.int64)
            token = tl.load(slot_of_row_ptr + offs_n, mask=mask_n, other=0) // TOP_K
            left_row = token if LEFT_IS_TOKENS else row
            right_row = token if RIGHT_IS_TOKENS else row
            left = tl.load(
                left_ptr + left_row[:, None] * P + offs_p[None, :],
                mask=mask_n[:, None] & mask_p[None, :], other=0.0,
            )  # [BLOCK_N, BLOCK_P]  # fmt: skip
            right = tl.load(
                right_ptr + right_row[:, None] * Q + offs_q[None, :],
                mask=mask_n[:, None] & mask_q[None, :], other=0.0,
            )  # [BLOCK_N, BLOCK_Q]  # fmt: skip
            acc = tl.dot(left.T, right, acc, input_precision="ieee")

        grad_ptrs = grad_ptr + expert.to(tl.int64) * P * Q
        if IS_ADDED:
            _add_columns(acc, grad_ptrs, offs_p, tile_q * BLOCK_Q, P * (end > start), Q, 64)
        else:
            mask = mask_p[:, None] & mask_q[None, :]
            grad_ptrs += offs_p.to(tl.int64)[:, None] * Q + offs_q[None, :]
            tl.store(grad_ptrs, acc.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_columns(acc, grad_ptr, offs_p, first_q, P, Q, MOST: tl.constexpr):
    """grad += acc, MOST columns at a time: what is read must fit beside the accumulator."""
    if acc.shape[1] > MOST:
        left, right = left_and_right(acc)
        _add_columns(left, grad_ptr, offs_p, first_q, P, Q, MOST)
        _add_columns(right, grad_ptr, offs_p, first_q + acc.shape[1] // 2, P, Q, MOST)
    else:
        offs_q = first_q + tl.arange(0, acc.shape[1])
        mask = (offs_p < P)[:, None] & (offs_q < Q)[None, :]
        grad_ptrs = grad_ptr + offs_p.to(tl.int64)[:, None] * Q + offs_q[None, :]
        tl.store(grad_ptrs, tl.load(grad_ptrs, mask=mask, other=0.0) + acc, mask=mask)


def launch_weight_gradient(
    left: Tensor,
    right: Tensor,
    plan: DispatchPlan,
    *,
    left_is_tokens: bool,
    right_is_tokens: bool,
    tile: Tile,
    into: Tensor | None = None,
) -> Tensor:
    """Return grad (E, P, Q) in left's type; or `into` (float32), to which it has been added."""
    num_experts, p, q = plan.offset_E.numel(), left.shape[1], right.shape[1]
    unit = 16 // left.element_size()
    grad_EPQ = left.new_empty(num_experts, p, q) if into is None else into
    _weight_gradient_kernel[(tile.programs * num_multiprocessors(left),)](
        left, right, plan.slot_of_row_N, plan.offset_E, grad_EPQ, p // unit, q // unit,
        num_experts,
        TOP_K=plan.top_k, LEFT_IS_TOKENS=left_is_tokens, RIGHT_IS_TOKENS=right_is_tokens,
        IS_ADDED=into is not None, UNIT=unit, BLOCK_P=tile.rows, BLOCK_Q=tile.columns,
        BLOCK_N=tile.reduction, GROUP=tile.group, NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return grad_EPQ
