"""From tokens to rows sorted by expert and back: each direction is the other's gradient.

Index arrays are those of dispatch_plan.py: slot_of_row_N and row_of_slot_TK, made by plan.py.
No atomic additions: a program sums the K rows of its tokens itself, in float32, k = 0 first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from phi_kernels.differentiation import refuse_second_gradient
from phi_kernels.dispatch_plan import DispatchPlan
from phi_kernels.triton_device import on_its_device, runs_triton

# of a program, at most: 16 numbers a thread of 4 warps, 8 of them (16 bytes of bfloat16) in a row
_ELEMENTS = 2048
_MOST_COLUMNS = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _gather_rows_kernel(
    x_ptr, slot_of_row_ptr, out_ptr, num_rows, width,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (N / BLOCK_N, D / BLOCK_D): a program reads and writes a block of rows' columns."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < num_rows
    mask = mask_n[:, None] & (offs_d < width)[None, :]
    token_n = tl.load(slot_of_row_ptr + offs_n, mask=mask_n, other=0) // K
    block = tl.load(x_ptr + token_n[:, None] * width + offs_d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_n[:, None] * width + offs_d[None, :], block, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _gather_sum_kernel(
    rows_ptr, row_of_slot_ptr, weight_ptr, out_ptr, num_tokens, width,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (T / BLOCK_T, D / BLOCK_D): a program reads its tokens' K rows, writes their sum.

    weight_ptr may be None: every weight is 1.
    """
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask = mask_t[:, None] & (offs_d < width)[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        row_t = tl.load(row_of_slot_ptr + offs_t * K + k, mask=mask_t, other=0)
        block = tl.load(rows_ptr + row_t[:, None] * width + offs_d[None, :], mask=mask, other=0.0)
        if weight_ptr is None:
            acc += block.to(tl.float32)
        else:
            weight_t = tl.load(weight_ptr + offs_t * K + k, mask=mask_t, other=0.0)
            acc += weight_t.to(tl.float32)[:, None] * block.to(tl.float32)
    tl.store(out_ptr + offs_t[:, None] * width + offs_d[None, :], acc, mask=mask)


@triton.jit
def _combine_bwd_kernel(
    grad_ptr, rows_ptr, row_of_slot_ptr, weight_ptr, grad_rows_ptr, grad_weight_ptr, width,
    K: tl.constexpr, K_PADDED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (T,): a program reads its token's gradient and K rows, writes the gradients of both.

    Row: weight * gradient. Weight: their dot product, summed over blocks before over columns.
    """
    token = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, K_PADDED)
    mask_k = offs_k < K
    offs_slot = token * K + offs_k
    row_k = tl.load(row_of_slot_ptr + offs_slot, mask=mask_k, other=0)
    weight_k = tl.load(weight_ptr + offs_slot, mask=mask_k, other=0.0).to(tl.float32)
    acc = tl.zeros([K_PADDED, BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < width
        mask = mask_k[:, None] & mask_d[None, :]
        grad = tl.load(grad_ptr + token * width + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        offs = row_k[:, None] * width + offs_d[None, :]
        acc += grad[None, :] * tl.load(rows_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_rows_ptr + offs, weight_k[:, None] * grad[None, :], mask=mask)
    tl.store(grad_weight_ptr + offs_slot, tl.sum(acc, axis=1), mask=mask_k)


@on_its_device
def launch_gather_rows(x_TD: Tensor, slot_of_row_N: Tensor, top_k: int) -> Tensor:
    """rows (N, D), each a copy of its token; reads no value on the host."""
    num_rows, width = slot_of_row_N.shape[0], x_TD.shape[1]
    rows_ND = x_TD.new_empty(num_rows, width)
    block_n, block_d = _blocks(width)
    sizes: dict[str, Any] = {"K": top_k, "BLOCK_N": block_n, "BLOCK_D": block_d}
    _gather_rows_kernel[_grid(num_rows, width)](
        x_TD.contiguous(), slot_of_row_N, rows_ND, num_rows, width, **sizes
    )
    return rows_ND


@on_its_device
def launch_gather_sum(rows_ND: Tensor, row_of_slot_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """y (T, D) in the rows' type: y_t = sum over k of weight[t, k] * rows[row[t, k]].

    Weights, of any type, enter in float32; None counts as all 1. Reads no value on the host.
    """
    (num_tokens, top_k), width = row_of_slot_TK.shape, rows_ND.shape[1]
    y_TD = rows_ND.new_empty(num_tokens, width)
    block_t, block_d = _blocks(width)
    sizes: dict[str, Any] = {"K": top_k, "BLOCK_T": block_t, "BLOCK_D": block_d}
    if weight_TK is not None:
        weight_TK = weight_TK.contiguous()
    _gather_sum_kernel[_grid(num_tokens, width)](
        rows_ND.contiguous(), row_of_slot_TK.contiguous(), weight_TK, y_TD, num_tokens, width,
        **sizes,
    )  # fmt: skip
    return y_TD


@on_its_device
def launch_combine_backward(
    grad_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, row_of_slot_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of launch_gather_sum's rows and weights; every row belongs to one slot."""
    (num_tokens, top_k), width = row_of_slot_TK.shape, rows_ND.shape[1]
    grad_rows_ND, grad_weight_TK = _empty(rows_ND), _empty(weight_TK)
    padded = _power_of_2(top_k)
    block_d = min(_MOST_COLUMNS, _power_of_2(width), max(16, _ELEMENTS // padded))
    sizes: dict[str, Any] = {"K": top_k, "K_PADDED": padded, "BLOCK_D": block_d}
    _combine_bwd_kernel[(num_tokens,)](
        grad_TD.contiguous(), rows_ND.contiguous(), row_of_slot_TK.contiguous(),
        weight_TK.contiguous(), grad_rows_ND, grad_weight_TK, width, **sizes,
    )  # fmt: skip
    return grad_rows_ND, grad_weight_TK


def _blocks(width: int) -> tuple[int, int]:
    """Rows and columns of a program."""
    columns = min(_MOST_COLUMNS, _power_of_2(width))
    return _ELEMENTS // columns, columns


def _grid(num_rows: int, width: int) -> tuple[int, int]:
    block_rows, block_columns = _blocks(width)
    return -(-num_rows // block_rows), -(-width // block_columns)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@torch.library.custom_op("phi_kernels::gather_rows", mutates_args=())
def _gather_op(x_TD: Tensor, slot_of_row_N: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    if not runs_triton(x_TD):
        return x_TD.index_select(0, slot_of_row_N // row_of_slot_TK.shape[1])
    return launch_gather_rows(x_TD, slot_of_row_N, row_of_slot_TK.shape[1])


@_gather_op.register_fake
def _(x_TD: Tensor, slot_of_row_N: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    return x_TD.new_empty(slot_of_row_N.shape[0], x_TD.shape[1])


@torch.library.custom_op("phi_kernels::gather_sum", mutates_args=())
def _sum_op(
    rows_ND: Tensor, weight_TK: Tensor | None, slot_of_row_N: Tensor, row_of_slot_TK: Tensor
) -> Tensor:
    if not runs_triton(rows_ND):
        return gathered_sum(rows_ND, row_of_slot_TK, weight_TK)
    return launch_gather_sum(rows_ND, row_of_slot_TK, weight_TK)


@_sum_op.register_fake
def _(
    rows_ND: Tensor, weight_TK: Tensor | None, slot_of_row_N: Tensor, row_of_slot_TK: Tensor
) -> Tensor:
    return rows_ND.new_empty(row_of_slot_TK.shape[0], rows_ND.shape[1])


@torch.library.custom_op("phi_kernels::combine_backward", mutates_args=())
def _combine_backward_op(
    grad_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, row_of_slot_TK: Tensor
) -> tuple[Tensor, Tensor]:
    if not runs_triton(rows_ND):
        return _combine_backward(grad_TD, rows_ND, weight_TK, row_of_slot_TK)
    return launch_combine_backward(grad_TD, rows_ND, weight_TK, row_of_slot_TK)


@_combine_backward_op.register_fake
def _(
    grad_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, row_of_slot_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return _empty(rows_ND), _empty(weight_TK)


def _save_gather(ctx, inputs, output) -> None:
    _, slot_of_row_N, row_of_slot_TK = inputs
    ctx.save_for_backward(slot_of_row_N, row_of_slot_TK)


def _gather_gradient(ctx, grad_ND):
    return _sum_op(grad_ND, None, *ctx.saved_tensors), None, None


def _save_sum(ctx, inputs, output) -> None:
    rows_ND, weight_TK, slot_of_row_N, row_of_slot_TK = inputs
    # without weights the rows' values are not read again
    kept = (None, None) if weight_TK is None else (rows_ND, weight_TK)
    ctx.save_for_backward(*kept, slot_of_row_N, row_of_slot_TK)


def _sum_gradient(ctx, grad_TD):
    rows_ND, weight_TK, slot_of_row_N, row_of_slot_TK = ctx.saved_tensors
    if weight_TK is None:
        return _gather_op(grad_TD, slot_of_row_N, row_of_slot_TK), None, None, None
    return (*_combine_backward_op(grad_TD, rows_ND, weight_TK, row_of_slot_TK), None, None)


_gather_op.register_autograd(_gather_gradient, setup_context=_save_gather)
_sum_op.register_autograd(_sum_gradient, setup_context=_save_sum)
_combine_backward_op.register_autograd(refuse_second_gradient)


def gather_rows(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Return rows_ND, each a copy of its token, sorted by expert."""
    return _gather_op(x_TD, plan.slot_of_row_N, plan.row_of_slot_TK)


def combine_rows(rows_ND: Tensor, weight_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Return y_TD in the rows' type, the sum of each token's rows times their weights."""
    return _sum_op(rows_ND, weight_TK, plan.slot_of_row_N, plan.row_of_slot_TK)


def _combine_backward(
    grad_TD: Tensor, rows_ND: Tensor, weight_TK: Tensor, row_of_slot_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """launch_combine_backward where no Triton runs."""
    # float32 at least: a sum over D of products
    dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    row_N, top_k = row_of_slot_TK.flatten(), row_of_slot_TK.shape[1]
    grad_slot_ND = grad_TD.to(dtype).repeat_interleave(top_k, dim=0)
    grad_weight_N = torch.linalg.vecdot(grad_slot_ND, rows_ND.to(dtype)[row_N])
    grad_ND = torch.empty_like(grad_slot_ND)
    grad_ND[row_N] = grad_slot_ND.mul_(weight_TK.flatten()[:, None])
    return grad_ND.to(rows_ND.dtype), grad_weight_N.view_as(weight_TK).to(weight_TK.dtype)


def gathered_sum(rows_ND: Tensor, row_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """y_t = sum over k of weight[t, k] * rows[row[t, k]], gathered and summed in one pass.

    Sums in float32. 1,024 tokens of 256 bfloat16 on two CPU cores: 27 us with weights rounded
    (error 0.0023), 46 us with weights in two parts (0.0017, the rounding of y itself); indexing and
    a product take 340 us.
    """
    if weight_TK is not None:
        row_TK, weight_TK = terms_of(row_TK, weight_TK, rows_ND.dtype)
    return functional.embedding_bag(row_TK, rows_ND, mode="sum", per_sample_weights=weight_TK)


def terms_of(row_TK: Tensor, weight_TK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows and weights (T, J) of dtype: a weight of more digits becomes a sum of two.

    torch takes weights in the rows' type: a weight as its rounding and the rest is as good as
    float32 (16 digits instead of 8 in bfloat16).
    """
    rounded_TK = weight_TK.to(dtype)
    if torch.promote_types(dtype, weight_TK.dtype) == dtype:
        return row_TK, rounded_TK
    rest_TK = (weight_TK - rounded_TK).to(dtype)
    return torch.cat([row_TK, row_TK], dim=1), torch.cat([rounded_TK, rest_TK], dim=1)
