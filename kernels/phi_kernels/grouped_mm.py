"""The experts on torch.nn.functional.grouped_mm: one call for all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from phi_kernels.combine import combine_rows, gather_rows
from phi_kernels.dispatch_plan import DispatchPlan


def expert_mlp(
    x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same as reference.expert_mlp; float32 and bfloat16, D and F multiples of 8."""
    rows_ND = gather_rows(x_TD, plan)
    rows_ND = expert_rows(rows_ND, plan.offset_E, gate_up_EHD, down_EDF)
    return combine_rows(rows_ND, weight_TK, plan)


def expert_rows(rows_ND: Tensor, offset_E: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor) -> Tensor:
    """Return rows (N, D) for rows sorted by expert, unweighted."""
    hidden = functional.grouped_mm(rows_ND, gate_up_EHD.transpose(1, 2), offs=offset_E)
    gate, up = hidden.chunk(2, dim=-1)
    activated = functional.silu(gate)
    # without gradients in place: one large temporary less
    activated = activated * up if torch.is_grad_enabled() else activated.mul_(up)
    return functional.grouped_mm(activated, down_EDF.transpose(1, 2), offs=offset_E)
