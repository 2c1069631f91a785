"""The experts on a CPU: one after the other, from the gather of their rows to the weighted sum.

On torch's products. bfloat16 on a CPU with AVX-512 BF16 has faster ones: avx512_experts.py.

Saved for the backward pass are the tokens, the routing weights and the pre-activation; rows and
activation are made again, each expert's right before its products, in memory that the next expert
uses again. Routing weights are applied where rows are gathered or summed, never to the activation.
With g = dL/dy of a row's token, w its weight, h its activation and x its token:

    dh = w g W2     dW2 = sum (w g)T h     dw = (g W2) . h, so no output row is saved
    dg, du from g W2 without w             dW1 = sum dgT (w x)     dx = w (dg W1 + du W3)

oneDNN compiles a product anew (0.4 ms) for every number of rows it has not seen, and routing makes
new ones in every step; so an expert's last row is repeated up to a number that comes again. The
repeated rows weigh nothing, and in results they are overwritten by the rows of the next expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from phi_kernels import avx512_experts, grouped_mm
from phi_kernels.combine import gathered_sum, terms_of
from phi_kernels.cpu_products import (
    is_compiled_by_shape,
    is_onednn_faster,
    product,
    product_into,
    scratch,
)
from phi_kernels.dispatch_plan import DispatchPlan

# Up to so many rows an expert, inference takes torch's one call for all experts: the numbers of
# rows are then few enough that nearly all of their products are compiled already. 16 experts,
# D 256, F 400, bfloat16, two cores: 64 rows each 3.0 ms there, 3.5 ms here; 128 rows 4.2 and 4.5.
# Where its float32 products are the slower library's: 4 rows each 1.9 and 2.2 ms, 16 rows 3.5, 3.1
_MOST_ROWS_OF_ONE_CALL = 128
_MOST_ROWS_OF_ONE_SLOW_CALL = 8
_FEWEST_ROWS = 4  # a call for all experts would visit those without rows too


def expert_mlp(
    x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same as reference.expert_mlp, on a CPU; not differentiable twice."""
    if x_TD.device.type != "cpu":
        raise ValueError(f"the cpu back-end got tokens on {x_TD.device}; choose another back-end")
    if avx512_experts.takes(x_TD, gate_up_EHD, down_EDF):
        return avx512_experts.expert_mlp(x_TD, weight_TK, plan, gate_up_EHD, down_EDF)
    inputs = (x_TD, weight_TK, gate_up_EHD, down_EDF)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _ExpertMlp.apply(*inputs, plan)  # type: ignore[return-value]
    rows_ND = _inference_rows(x_TD, plan, gate_up_EHD, down_EDF)
    return gathered_sum(rows_ND, plan.row_of_slot_TK, weight_TK)


def _inference_rows(
    x_TD: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    num_rows = len(plan.slot_of_row_N)
    is_few = num_rows <= _FEWEST_ROWS
    if is_few or _is_one_call_faster(num_rows, x_TD.dtype, gate_up_EHD):
        rows_ND = x_TD.index_select(0, plan.token_of_row_N())
        expert_rows = _few_rows if is_few else grouped_mm.expert_rows
        return expert_rows(rows_ND, plan.offset_E, gate_up_EHD, down_EDF)
    rows = _padded_rows(plan, x_TD.dtype)
    return _forward(x_TD, rows, gate_up_EHD, down_EDF, keeps_hidden=False)[0]


def _few_rows(rows_ND: Tensor, offset_E: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor) -> Tensor:
    """A token or two: only the experts that have rows are touched at all."""
    out_ND, start = torch.empty_like(rows_ND), 0
    for expert, end in enumerate(offset_E.tolist()):
        if end > start:
            hidden = rows_ND.new_empty(end - start, gate_up_EHD.shape[1])
            torch.mm(rows_ND[start:end], gate_up_EHD[expert].t(), out=hidden)
            gate, up = hidden.chunk(2, dim=-1)
            torch.mm(functional.silu(gate).mul_(up), down_EDF[expert].t(), out=out_ND[start:end])
        start = end
    return out_ND


def _is_one_call_faster(num_rows: int, dtype: torch.dtype, gate_up_EHD: Tensor) -> bool:
    """torch's grouped_mm takes two types, and rows that start at multiples of 16 bytes."""
    num_experts, h, d = gate_up_EHD.shape
    fits = dtype in (torch.float32, torch.bfloat16) and d % 8 == 0 and h % 16 == 0
    most = _MOST_ROWS_OF_ONE_SLOW_CALL if is_onednn_faster(dtype) else _MOST_ROWS_OF_ONE_CALL
    return fits and num_rows <= most * num_experts


class _Part(NamedTuple):
    """An expert with rows start to end, computed as num_rows: its own, and its last repeated."""

    expert: int
    start: int
    end: int
    num_rows: int

    @property
    def computed(self) -> slice:
        """Where its results go; beyond `end` the next expert writes later, or nobody reads."""
        return slice(self.start, self.start + self.num_rows)


class _PaddedRows(NamedTuple):
    """The P computed rows of all experts, one part after the other."""

    parts: list[_Part]
    token_P: Tensor
    slot_P: Tensor
    is_own_P: Tensor

    @property
    def lengths(self) -> list[int]:
        return [part.num_rows for part in self.parts]

    @property
    def most(self) -> int:
        return max(self.lengths, default=0)

    @property
    def reach(self) -> int:
        return max((part.computed.stop for part in self.parts), default=0)


def _padded_rows(plan: DispatchPlan, dtype: torch.dtype) -> _PaddedRows:
    parts, start = [], 0
    for expert, end in enumerate(plan.offset_E.tolist()):
        if end > start:
            num_rows = _rounded(end - start) if is_compiled_by_shape(dtype) else end - start
            parts.append(_Part(expert, start, end, num_rows))
        start = end
    bounds = torch.tensor([part[1:] for part in parts], dtype=torch.int64).view(-1, 3)
    start_A, end_A, length_A = bounds.unbind(1)  # A: the experts that have rows
    part_P = torch.repeat_interleave(length_A)
    row_P = torch.arange(len(part_P)) + (start_A + length_A - length_A.cumsum(0))[part_P]
    end_P = end_A[part_P]
    slot_P = plan.slot_of_row_N[torch.minimum(row_P, end_P - 1)]
    return _PaddedRows(parts, slot_P // plan.top_k, slot_P, row_P < end_P)


def _rounded(num_rows: int) -> int:
    """Up to a multiple of 8, or of 16 from 64 rows on; a few rows stay as they are."""
    step = 1 if num_rows <= 8 else 8 if num_rows <= 64 else 16
    return -(-num_rows // step) * step


def _forward(
    x_TD: Tensor,
    rows: _PaddedRows,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    keeps_hidden: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the experts' rows, unweighted, and the pre-activation of each part where kept."""
    (h, d), f, dtype = gate_up_EHD.shape[1:], down_EDF.shape[2], x_TD.dtype
    out_ND = torch.empty(rows.reach, d, dtype=dtype)
    x_MD, act_MF = (torch.empty(rows.most, width, dtype=dtype) for width in (d, f))
    hidden_PH = scratch(len(rows.token_P) if keeps_hidden else rows.most, h, dtype)
    kept, begin = [], 0
    for part, token_M in zip(rows.parts, rows.token_P.split(rows.lengths), strict=True):
        m, expert = part.num_rows, part.expert
        gathered_MD = torch.index_select(x_TD, 0, token_M, out=x_MD[:m])
        target_MH = None if hidden_PH is None else hidden_PH[begin : begin + m]
        hidden_MH = product(gathered_MD, gate_up_EHD[expert].t(), target_MH)
        gate_MF, up_MF = hidden_MH.chunk(2, dim=-1)
        activated_MF = torch.ops.aten.silu.out(gate_MF, out=act_MF[:m]).mul_(up_MF)
        product_into(out_ND[part.computed], activated_MF, down_EDF[expert].t())
        if keeps_hidden:
            kept.append(hidden_MH)
            begin += m
    return out_ND, kept


class _ExpertMlp(torch.autograd.Function):
    """expert_mlp with gradients of the four floating-point inputs, each only where asked for."""

    @staticmethod
    def forward(ctx, x_TD, weight_TK, gate_up_EHD, down_EDF, plan):
        x_TD = x_TD.contiguous()  # once, not by every gather
        rows = _padded_rows(plan, x_TD.dtype)
        out_ND, hidden = _forward(x_TD, rows, gate_up_EHD, down_EDF, keeps_hidden=True)
        ctx.plan, ctx.rows = plan, rows
        ctx.save_for_backward(x_TD, weight_TK, gate_up_EHD, down_EDF, *hidden)
        return gathered_sum(out_ND, plan.row_of_slot_TK, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        grad_TD, plan, rows = grads[0].contiguous(), ctx.plan, ctx.rows
        x_TD, weight_TK, gate_up_EHD, down_EDF, *hidden = ctx.saved_tensors
        needs_x, needs_weight, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        d, f, dtype = down_EDF.shape[1], down_EDF.shape[2], x_TD.dtype
        gradients = _Gradients(
            torch.empty(rows.reach, d, dtype=dtype) if needs_x else None,
            _empty_dots(plan, dtype) if needs_weight else None,
            _empty_gradient(gate_up_EHD, rows) if needs_gate_up else None,
            _empty_gradient(down_EDF, rows) if needs_down else None,
        )
        buffers = _Buffers.of(rows.most, d=d, f=f, dtype=dtype)
        weight_P1 = (weight_TK.flatten()[rows.slot_P] * rows.is_own_P)[:, None]
        token_PJ, weight_PJ = terms_of(rows.token_P[:, None], weight_P1, dtype)
        per_part = (tensor.split(rows.lengths) for tensor in (token_PJ, weight_PJ))
        for part, hidden_MH, *terms in zip(rows.parts, hidden, *per_part, strict=True):
            weights = gate_up_EHD[part.expert], down_EDF[part.expert]
            buffer = buffers.first(part.num_rows)
            _backward_part(part, x_TD, grad_TD, weights, hidden_MH, terms, buffer, gradients)
        grad_x_TD = grad_weight_TK = None
        if gradients.rows_ND is not None:
            grad_x_TD = gathered_sum(gradients.rows_ND, plan.row_of_slot_TK, weight_TK)
        if gradients.dot_N is not None:
            grad_weight_TK = gradients.dot_N[plan.row_of_slot_TK].to(weight_TK.dtype)
        return grad_x_TD, grad_weight_TK, gradients.gate_up_EHD, gradients.down_EDF, None


class _Gradients(NamedTuple):
    """Where the parts write; None where nobody asked."""

    rows_ND: Tensor | None  # of each row's token, before the routing weight
    dot_N: Tensor | None  # of each row's routing weight
    gate_up_EHD: Tensor | None
    down_EDF: Tensor | None


def _backward_part(
    part: _Part,
    x_TD: Tensor,
    grad_TD: Tensor,
    weights: tuple[Tensor, Tensor],
    hidden_MH: Tensor,
    terms: list[Tensor],
    buffer: _Buffers,
    gradients: _Gradients,
) -> None:
    """Write one expert's gradients; the formulas are at the head of this file."""
    (gate_up_HD, down_DF), expert = weights, part.expert
    gate_MF, up_MF = hidden_MH.chunk(2, dim=-1)
    gated_MF = torch.ops.aten.silu.out(gate_MF, out=buffer.gated_MF)
    act_MF = torch.mul(gated_MF, up_MF, out=buffer.act_MF)
    if gradients.down_EDF is not None:
        weighted_MD = gathered_sum(grad_TD, *terms)
        product_into(gradients.down_EDF[expert], weighted_MD.t(), act_MF)
    needs_hidden = gradients.gate_up_EHD is not None or gradients.rows_ND is not None
    if not needs_hidden and gradients.dot_N is None:
        return
    grad_MD = torch.index_select(grad_TD, 0, terms[0][:, 0], out=buffer.grad_MD)
    grad_act_MF = product(grad_MD, down_DF, buffer.grad_act_MF)
    if gradients.dot_N is not None:
        dot_M = gradients.dot_N[part.start : part.end]
        torch.sum(act_MF.mul_(grad_act_MF)[: len(dot_M)], -1, dtype=dot_M.dtype, out=dot_M)
    if not needs_hidden:
        return
    grad_hidden_MH = buffer.grad_hidden_MH
    grad_gate_MF, grad_up_MF = grad_hidden_MH.chunk(2, dim=-1)
    torch.mul(grad_act_MF, gated_MF, out=grad_up_MF)
    torch.ops.aten.silu_backward.grad_input(
        grad_act_MF.mul_(up_MF), gate_MF, grad_input=grad_gate_MF
    )
    if gradients.gate_up_EHD is not None:
        weighted_MD = gathered_sum(x_TD, *terms)
        product_into(gradients.gate_up_EHD[expert], grad_hidden_MH.t(), weighted_MD)
    if gradients.rows_ND is not None:
        product_into(gradients.rows_ND[part.computed], grad_hidden_MH, gate_up_HD)


class _Buffers(NamedTuple):
    """What the backward pass of one expert writes, for the next to write again."""

    grad_MD: Tensor
    gated_MF: Tensor
    act_MF: Tensor
    grad_hidden_MH: Tensor
    grad_act_MF: Tensor | None

    @staticmethod
    def of(most: int, *, d: int, f: int, dtype: torch.dtype) -> _Buffers:
        grad_MD, gated_MF, act_MF, grad_hidden_MH = (
            torch.empty(most, width, dtype=dtype) for width in (d, f, f, 2 * f)
        )
        return _Buffers(grad_MD, gated_MF, act_MF, grad_hidden_MH, scratch(most, f, dtype))

    def first(self, num_rows: int) -> _Buffers:
        made = [buffer[:num_rows] for buffer in self[:4]]
        grad_act_MF = None if self.grad_act_MF is None else self.grad_act_MF[:num_rows]
        return _Buffers(made[0], made[1], made[2], made[3], grad_act_MF)


def _empty_dots(plan: DispatchPlan, dtype: torch.dtype) -> Tensor:
    """float32 at least: each is a sum over F of products."""
    return torch.empty(len(plan.slot_of_row_N), dtype=torch.promote_types(dtype, torch.float32))


def _empty_gradient(parameter: Tensor, rows: _PaddedRows) -> Tensor:
    """Unwritten, but zero for experts without rows: every other slice is written as a whole."""
    gradient = torch.empty_like(parameter)
    for expert in set(range(len(parameter))) - {part.expert for part in rows.parts}:
        gradient[expert].zero_()
    return gradient
