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
from torch.nn import functional

from phi_kernels import avx512_experts, grouped_mm, reference
from phi_kernels.combine import gathered_sum, terms_of
from phi_kernels.cpu_products import (
    is_compiled_by_shape,
    is_onednn_faster,
    product,
    product_into,
    scratch,
)
from phi_kernels.differentiation import is_transformed, refuse_second_gradient
from phi_kernels.dispatch_plan import DispatchPlan, Needs

# Up to so many rows an expert, inference takes torch's one call for all experts: the numbers of
# rows are then few enough that nearly all of their products are compiled already. 16 experts,
# D 256, F 400, bfloat16, two cores: 64 rows each 3.0 ms there, 3.5 ms here; 128 rows 4.2 and 4.5.
# Where its float32 products are the slower library's: 4 rows each 1.9 and 2.2 ms, 16 rows 3.5, 3.1
_MOST_ROWS_OF_ONE_CALL = 128
_MOST_ROWS_OF_ONE_SLOW_CALL = 8
_ROW_STEP = 16  # the most that rows are rounded up to
_FEWEST_ROWS = 4  # a call for all experts would visit those without rows too


def expert_mlp(
    x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same as reference.expert_mlp, on a CPU; differentiable once."""
    if x_TD.device.type != "cpu":
        raise ValueError(f"the cpu back-end got tokens on {x_TD.device}; choose another back-end")
    if is_transformed():
        return reference.every_expert_mlp(x_TD, weight_TK, plan, gate_up_EHD, down_EDF)
    leaves = (x_TD, weight_TK, gate_up_EHD, down_EDF)
    keeps_hidden = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
    x_TD = x_TD.contiguous()
    # an operator's call costs 40 us, a quarter of a token's experts in a small model
    if not keeps_hidden and not torch.compiler.is_compiling():
        return _forward(x_TD, weight_TK, plan, gate_up_EHD, down_EDF, hidden_PH=None)
    y_TD, _ = torch.ops.phi_kernels.cpu_expert_mlp(
        x_TD, weight_TK, *plan, gate_up_EHD, down_EDF, keeps_hidden
    )
    return y_TD


def _forward(
    x_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    hidden_PH: Tensor | None,
) -> Tensor:
    """Return y_TD of contiguous tokens; write the pre-activation to hidden_PH where it is given."""
    weights = gate_up_EHD, down_EDF
    if avx512_experts.takes(x_TD, *weights):
        return avx512_experts.forward(x_TD, weight_TK, plan, *weights, hidden_NH=hidden_PH)
    if hidden_PH is None:
        rows_ND = _inference_rows(x_TD, plan, *weights)
    else:
        rows_ND = _expert_rows(x_TD, _padded_rows(plan, x_TD.dtype), *weights, hidden_PH=hidden_PH)
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
    return _expert_rows(x_TD, rows, gate_up_EHD, down_EDF)


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
    step = 1 if num_rows <= 8 else 8 if num_rows <= 64 else _ROW_STEP
    return -(-num_rows // step) * step


def _expert_rows(
    x_TD: Tensor,
    rows: _PaddedRows,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    hidden_PH: Tensor | None = None,
) -> Tensor:
    """Return the experts' rows, unweighted; write the parts' pre-activations to hidden_PH."""
    (h, d), f, dtype = gate_up_EHD.shape[1:], down_EDF.shape[2], x_TD.dtype
    out_ND = torch.empty(rows.reach, d, dtype=dtype)
    x_MD, act_MF = (torch.empty(rows.most, width, dtype=dtype) for width in (d, f))
    scratch_MH = scratch(rows.most, h, dtype) if hidden_PH is None else None
    begin = 0
    for part, token_M in zip(rows.parts, rows.token_P.split(rows.lengths), strict=True):
        m, expert = part.num_rows, part.expert
        gathered_MD = torch.index_select(x_TD, 0, token_M, out=x_MD[:m])
        weight_DH = gate_up_EHD[expert].t()
        if hidden_PH is None:
            target_MH = None if scratch_MH is None else scratch_MH[:m]
            hidden_MH = product(gathered_MD, weight_DH, target_MH)
        else:
            hidden_MH = hidden_PH[begin : begin + m]
            product_into(hidden_MH, gathered_MD, weight_DH)
            begin += m
        gate_MF, up_MF = hidden_MH.chunk(2, dim=-1)
        activated_MF = torch.ops.aten.silu.out(gate_MF, out=act_MF[:m]).mul_(up_MF)
        product_into(out_ND[part.computed], activated_MF, down_EDF[expert].t())
    return out_ND


def _backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    hidden_PH: Tensor,
    *,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the tokens, the routing weights and the experts' two weights."""
    rows = _padded_rows(plan, x_TD.dtype)
    d, f, dtype = down_EDF.shape[1], down_EDF.shape[2], x_TD.dtype
    gradients = _Gradients(
        torch.empty(rows.reach, d, dtype=dtype) if needs.x else None,
        _empty_dots(plan, dtype) if needs.weight else None,
        _empty_gradient(gate_up_EHD, rows) if needs.gate_up else None,
        _empty_gradient(down_EDF, rows) if needs.down else None,
    )
    buffers = _Buffers.of(rows.most, d=d, f=f, dtype=dtype)
    weight_P1 = (weight_TK.flatten()[rows.slot_P] * rows.is_own_P)[:, None]
    token_PJ, weight_PJ = terms_of(rows.token_P[:, None], weight_P1, dtype)
    hidden = hidden_PH[: len(rows.token_P)]
    per_part = (tensor.split(rows.lengths) for tensor in (hidden, token_PJ, weight_PJ))
    for part, hidden_MH, *terms in zip(rows.parts, *per_part, strict=True):
        weights = gate_up_EHD[part.expert], down_EDF[part.expert]
        buffer = buffers.first(part.num_rows)
        _backward_part(part, x_TD, grad_TD, weights, hidden_MH, terms, buffer, gradients)
    grad_x_TD = grad_weight_TK = None
    if gradients.rows_ND is not None:
        grad_x_TD = gathered_sum(gradients.rows_ND, plan.row_of_slot_TK, weight_TK)
    if gradients.dot_N is not None:
        grad_weight_TK = gradients.dot_N[plan.row_of_slot_TK].to(weight_TK.dtype)
    return grad_x_TD, grad_weight_TK, gradients.gate_up_EHD, gradients.down_EDF


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


def _num_hidden_rows(x_TD: Tensor, plan: DispatchPlan, gate_up: Tensor, down: Tensor) -> int:
    """How many rows the kept pre-activation has room for; known without the routing's values."""
    num_rows, num_experts = plan.slot_of_row_N.shape[0], plan.offset_E.shape[0]
    if avx512_experts.takes(x_TD, gate_up, down) or not is_compiled_by_shape(x_TD.dtype):
        return num_rows
    return num_rows + (_ROW_STEP - 1) * num_experts


@torch.library.custom_op("phi_kernels::cpu_expert_mlp", mutates_args=(), device_types="cpu")
def _forward_op(
    x_TD: Tensor,
    weight_TK: Tensor,
    slot_of_row_N: Tensor,
    row_of_slot_TK: Tensor,
    offset_E: Tensor,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    keeps_hidden: bool,
) -> tuple[Tensor, Tensor]:
    plan = DispatchPlan(slot_of_row_N, row_of_slot_TK, offset_E)
    num_kept = _num_hidden_rows(x_TD, plan, gate_up_EHD, down_EDF) if keeps_hidden else 0
    hidden_PH = x_TD.new_empty(num_kept, gate_up_EHD.shape[1])
    y_TD = _forward(
        x_TD, weight_TK, plan, gate_up_EHD, down_EDF, hidden_PH=hidden_PH if keeps_hidden else None
    )
    return y_TD, hidden_PH


@_forward_op.register_fake
def _(
    x_TD, weight_TK, slot_of_row_N, row_of_slot_TK, offset_E, gate_up_EHD, down_EDF, keeps_hidden
):  # fmt: skip
    plan = DispatchPlan(slot_of_row_N, row_of_slot_TK, offset_E)
    num_kept = _num_hidden_rows(x_TD, plan, gate_up_EHD, down_EDF) if keeps_hidden else 0
    return torch.empty_like(x_TD), x_TD.new_empty(num_kept, gate_up_EHD.shape[1])


@torch.library.custom_op(
    "phi_kernels::cpu_expert_mlp_backward", mutates_args=(), device_types="cpu"
)
def _backward_op(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    slot_of_row_N: Tensor,
    row_of_slot_TK: Tensor,
    offset_E: Tensor,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    hidden_PH: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan, weights = DispatchPlan(slot_of_row_N, row_of_slot_TK, offset_E), (gate_up_EHD, down_EDF)
    is_own = avx512_experts.takes(x_TD, *weights)
    backward = avx512_experts.backward if is_own else _backward
    made = backward(grad_TD, x_TD, weight_TK, plan, *weights, hidden_PH, needs=Needs(*needs))
    x, weight, gate_up, down = (x_TD.new_empty(0) if each is None else each for each in made)
    return x, weight, gate_up, down


@_backward_op.register_fake
def _(
    grad_TD, x_TD, weight_TK, slot_of_row_N, row_of_slot_TK, offset_E, gate_up_EHD, down_EDF,
    hidden_PH, needs,
):  # fmt: skip
    inputs = (x_TD, weight_TK.contiguous(), gate_up_EHD, down_EDF)
    x, weight, gate_up, down = (
        torch.empty_like(like) if is_needed else x_TD.new_empty(0)
        for like, is_needed in zip(inputs, needs, strict=True)
    )
    return x, weight, gate_up, down


def _save(ctx, inputs, output) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_TD, _):
    if grad_TD is None:
        return (None,) * 8
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 5, 6)]
    made = torch.ops.phi_kernels.cpu_expert_mlp_backward(
        grad_TD.contiguous(), *ctx.saved_tensors, needs
    )
    x, weight, gate_up, down = (
        gradient if is_needed else None for gradient, is_needed in zip(made, needs, strict=True)
    )
    return x, weight, None, None, None, gate_up, down, None


_forward_op.register_autograd(_gradients, setup_context=_save)
_backward_op.register_autograd(refuse_second_gradient)
