"""The expert arithmetic on a CPU: one product after the other, each written where it belongs.

No copy of the rows is made: an expert's rows are a slice, and its products write into slices. In
bfloat16 oneDNN compiles a product anew (0.4 ms) for every number of rows it has not seen, and
routing makes new ones in every step; so a slice is taken a little longer than needed, to a number
that comes again. What it computes beyond its rows is overwritten by the expert they belong to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from phi_kernels import grouped_mm
from phi_kernels.combine import combine_rows, gather_rows
from phi_kernels.dispatch_plan import DispatchPlan

# Up to so many rows an expert, inference takes torch's one call for all experts: the numbers of
# rows are then few enough that nearly all of their products are compiled already. 16 experts,
# D 256, F 400, bfloat16, two cores: 64 rows each 3.0 ms there, 3.5 ms here; 128 rows 4.2 and 4.5
_MOST_ROWS_OF_ONE_CALL = 128
_FEWEST_ROWS = 4  # a call for all experts would visit those without rows too


def expert_mlp(
    x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same as reference.expert_mlp, on a CPU; not differentiable twice."""
    if x_TD.device.type != "cpu":
        raise ValueError(f"the cpu back-end got tokens on {x_TD.device}; choose another back-end")
    rows_ND = _expert_rows(gather_rows(x_TD, plan), plan.offset_E, gate_up_EHD, down_EDF)
    return combine_rows(rows_ND, weight_TK, plan)


def _expert_rows(
    rows_ND: Tensor, offset_E: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    inputs = (rows_ND, offset_E, gate_up_EHD, down_EDF)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if not needs_grad and len(rows_ND) <= _FEWEST_ROWS:
        return _few_rows(*inputs)
    few_rows = len(rows_ND) <= _MOST_ROWS_OF_ONE_CALL * len(offset_E)
    if few_rows and not needs_grad and _fits_one_call(rows_ND, gate_up_EHD):
        return grouped_mm.expert_rows(*inputs)
    return _ExpertMlp.apply(*inputs)  # type: ignore[return-value]


def _few_rows(rows_ND: Tensor, offset_E: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor) -> Tensor:
    """A token or two: only the experts that have rows are touched at all."""
    out_ND, start = torch.empty_like(rows_ND), 0
    for expert, end in enumerate(offset_E.tolist()):
        if end > start:
            hidden = torch.mm(rows_ND[start:end], gate_up_EHD[expert].t())
            torch.mm(_swiglu(hidden), down_EDF[expert].t(), out=out_ND[start:end])
        start = end
    return out_ND


def _fits_one_call(rows_ND: Tensor, gate_up_EHD: Tensor) -> bool:
    """torch's grouped_mm takes these types, and rows that start at multiples of 16 bytes."""
    widths = (rows_ND.shape[1], gate_up_EHD.shape[1] // 2)
    is_known = rows_ND.dtype in (torch.float32, torch.bfloat16)
    return is_known and len(rows_ND) > 0 and all(width % 8 == 0 for width in widths)


class _Part(NamedTuple):
    """An expert with rows: rows start to end, computed as start to reach."""

    expert: int
    start: int
    end: int
    reach: int


class _ExpertMlp(torch.autograd.Function):
    """Saves the rows and the pre-activation; the activation is made again in the backward pass."""

    @staticmethod
    def forward(ctx, rows_ND, offset_E, gate_up_EHD, down_EDF):
        parts = _parts(offset_E, dtype=rows_ND.dtype)
        most = max((part.reach for part in parts), default=0)
        needs_hidden = any(ctx.needs_input_grad)
        rows_ND = rows_ND.contiguous()
        longer_ND = rows_ND
        if most > len(rows_ND):  # only the last experts reach beyond the rows
            longer_ND = torch.cat(
                [rows_ND, rows_ND.new_zeros(most - len(rows_ND), rows_ND.shape[1])]
            )
        hidden_NH = rows_ND.new_empty(len(longer_ND) if needs_hidden else 0, gate_up_EHD.shape[1])
        out_ND = torch.empty_like(longer_ND)
        gate_up, down = gate_up_EHD.transpose(1, 2).unbind(), down_EDF.transpose(1, 2).unbind()
        for expert, start, _, reach in parts:
            target = {"out": hidden_NH[start:reach]} if needs_hidden else {}
            hidden = torch.mm(longer_ND[start:reach], gate_up[expert], **target)
            torch.mm(_swiglu(hidden), down[expert], out=out_ND[start:reach])
        ctx.parts = parts
        ctx.save_for_backward(longer_ND, hidden_NH, gate_up_EHD, down_EDF)
        return out_ND[: len(rows_ND)]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        longer_ND, hidden_NH, gate_up_EHD, down_EDF = ctx.saved_tensors
        grad_rows_ND = torch.empty_like(grad_ND)
        # zeros only for experts without rows: every other slice is written as a whole
        grad_gate_up_EHD, grad_down_EDF = torch.empty_like(gate_up_EHD), torch.empty_like(down_EDF)
        with_rows = {part.expert for part in ctx.parts}
        for expert in set(range(len(gate_up_EHD))) - with_rows:
            grad_gate_up_EHD[expert].zero_()
            grad_down_EDF[expert].zero_()
        for expert, start, end, reach in ctx.parts:
            # sums over rows: what was computed beyond the expert's own must not count
            grad = _padded(grad_ND[start:end], reach - start)
            hidden = hidden_NH[start:reach]
            gate, up = hidden.chunk(2, dim=-1)
            gated = functional.silu(gate)
            grad_act = torch.mm(grad, down_EDF[expert])
            torch.mm(grad.t(), gated * up, out=grad_down_EDF[expert])
            grad_hidden = torch.empty_like(hidden)
            grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
            torch.mul(grad_act, gated, out=grad_up)
            grad_gate.copy_(torch.ops.aten.silu_backward(grad_act.mul_(up), gate))
            torch.mm(grad_hidden.t(), longer_ND[start:reach], out=grad_gate_up_EHD[expert])
            grad_rows_ND[start:end] = torch.mm(grad_hidden, gate_up_EHD[expert])[: end - start]
        return grad_rows_ND, None, grad_gate_up_EHD, grad_down_EDF


def _padded(rows_ND: Tensor, num_rows: int) -> Tensor:
    if num_rows == len(rows_ND):
        return rows_ND.contiguous()
    padded = rows_ND.new_zeros(num_rows, rows_ND.shape[1])
    padded[: len(rows_ND)] = rows_ND
    return padded


def _swiglu(hidden_NH: Tensor) -> Tensor:
    gate, up = hidden_NH.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _parts(offset_E: Tensor, *, dtype: torch.dtype) -> list[_Part]:
    parts, start = [], 0
    for expert, end in enumerate(offset_E.tolist()):
        if end > start:
            is_compiled = dtype in (torch.bfloat16, torch.float16)
            num_rows = _rounded(end - start) if is_compiled else end - start
            parts.append(_Part(expert, start, end, start + num_rows))
        start = end
    return parts


def _rounded(num_rows: int) -> int:
    """Up to a multiple of 8, or of 16 from 64 rows on; a few rows stay as they are."""
    step = 1 if num_rows <= 8 else 8 if num_rows <= 64 else 16
    return -(-num_rows // step) * step
