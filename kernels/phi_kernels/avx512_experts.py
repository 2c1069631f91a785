"""The experts in bfloat16 on a CPU with AVX-512 BF16: our own products, everything else fused in.

The same operators in the same order as on a GPU (triton_experts.py), in C++ (avx512/):

    forward    hidden, act = gate_up(x)         rows read where the tokens are
               y = gathered_sum(act W2^T, w)
    backward   grad_hidden, w act, grad w = swiglu_backward(dy, w, hidden)
               grad W2 = dy^T (w act)           grad W13 = grad_hidden^T x
               grad x = gathered_sum(grad_hidden W13)

oneDNN's products, which cpu_experts.py takes otherwise, write a packed copy of each weight for
every product; here packing is part of the product and waits for no memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phi_kernels import avx512_build
from phi_kernels.combine import gathered_sum
from phi_kernels.dispatch_plan import DispatchPlan, Needs

# enough for every thread; 16,384 rows, two threads: 512 each 4 % slower, but 160 MB less beside
_ROWS_OF_A_THREAD = 2048


def takes(x_TD: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor) -> bool:
    """Whether this machine and these are its own: bfloat16, even widths, contiguous weights."""
    tensors = (x_TD, gate_up_EHD, down_EDF)
    return (
        all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        and all(width % 2 == 0 for width in down_EDF.shape[1:])
        and gate_up_EHD.is_contiguous()
        and down_EDF.is_contiguous()
        and avx512_build.is_available()
    )


class _Pass(NamedTuple):
    """Consecutive experts, their rows, and the arrays of these rows alone."""

    experts: slice
    rows: slice
    token_N: Tensor
    offset_E: Tensor


def _passes(plan: DispatchPlan) -> list[_Pass]:
    """Experts together until their rows are enough for every thread.

    What lies between two products of a pass then stays in the cache, and needs no more memory.
    """
    fewest = _ROWS_OF_A_THREAD * torch.get_num_threads()
    ends, token_N = plan.offset_E.tolist(), plan.token_of_row_N()
    passes, first, begin = [], 0, 0
    for expert, end in enumerate(ends):
        is_last = expert == len(ends) - 1
        if end - begin >= fewest or is_last:
            experts, rows = slice(first, expert + 1), slice(begin, end)
            offset_E = plan.offset_E[experts] - begin
            passes.append(_Pass(experts, rows, token_N[rows], offset_E))
            first, begin = expert + 1, end
    return passes


def _most_rows(passes: list[_Pass]) -> int:
    return max((len(each.token_N) for each in passes), default=0)


def forward(
    x_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    hidden_NH: Tensor | None,
) -> Tensor:
    """Return y_TD of contiguous tokens; write the pre-activation to hidden_NH where it is given."""
    ops, passes, (d, f) = torch.ops.phi_avx512, _passes(plan), down_EDF.shape[1:]
    num_rows = len(plan.slot_of_row_N)
    rows_ND, act_MF = x_TD.new_empty(num_rows, d), x_TD.new_empty(_most_rows(passes), f)
    for experts, rows, token_M, offset_E in passes:
        act, hidden = act_MF[: len(token_M)], None if hidden_NH is None else hidden_NH[rows]
        ops.gate_up(x_TD, gate_up_EHD[experts], token_M, offset_E, hidden, act)
        ops.grouped_gemm(act, down_EDF[experts], offset_E, True, rows_ND[rows])
    return gathered_sum(rows_ND, plan.row_of_slot_TK, weight_TK)


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    hidden_NH: Tensor,
    *,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, the routing weights, gate_up and down; None where not needed."""
    ops = torch.ops.phi_avx512
    passes, num_rows, (d, f) = _passes(plan), len(hidden_NH), down_EDF.shape[1:]
    weight_N = weight_TK.flatten()[plan.slot_of_row_N].float()
    rows_ND = x_TD.new_empty(num_rows, d) if needs.x else None
    dot_N = weight_N.new_empty(num_rows) if needs.weight else None
    grad_gate_up = torch.empty_like(gate_up_EHD) if needs.gate_up else None
    grad_down = torch.empty_like(down_EDF) if needs.down else None
    most = _most_rows(passes)
    grad_hidden_MH, act_MF = x_TD.new_empty(most, 2 * f), x_TD.new_empty(most, f)
    for experts, rows, token_M, offset_E in passes:
        grad_hidden, act = grad_hidden_MH[: len(token_M)], act_MF[: len(token_M)]
        dot_MG = ops.swiglu_backward(
            grad_TD, weight_N[rows], down_EDF[experts], hidden_NH[rows], token_M, offset_E,
            grad_hidden, act,
        )  # fmt: skip
        if dot_N is not None:
            torch.sum(dot_MG, dim=1, out=dot_N[rows])
        if grad_down is not None:
            ops.weight_gradient(grad_TD, act, token_M, offset_E, True, grad_down[experts])
        if grad_gate_up is not None:
            ops.weight_gradient(grad_hidden, x_TD, token_M, offset_E, False, grad_gate_up[experts])
        if rows_ND is not None:
            ops.grouped_gemm(grad_hidden, gate_up_EHD[experts], offset_E, False, rows_ND[rows])
    grad_x = grad_weight = None
    if rows_ND is not None:
        grad_x = gathered_sum(rows_ND, plan.row_of_slot_TK, None)
    if dot_N is not None:
        grad_weight = dot_N[plan.row_of_slot_TK].to(weight_TK.dtype)
    return grad_x, grad_weight, grad_gate_up, grad_down
