"""The experts on torch.nn.functional.grouped_mm: one call for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from phi_kernels import reference
from phi_kernels.combine import combine_rows, gather_rows
from phi_kernels.differentiation import is_transformed, refuse_second_gradient
from phi_kernels.dispatch_plan import DispatchPlan


def expert_mlp(
    x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same as reference.expert_mlp; float32 and bfloat16, D and F multiples of 8."""
    if is_transformed():
        return reference.every_expert_mlp(x_TD, weight_TK, plan, gate_up_EHD, down_EDF)
    rows_ND = gather_rows(x_TD, plan)
    rows_ND = expert_rows(rows_ND, plan.offset_E, gate_up_EHD, down_EDF, product=_product_op)
    return combine_rows(rows_ND, weight_TK, plan)


def grouped_product(rows_NP: Tensor, weight_EPQ: Tensor, offset_E: Tensor) -> Tensor:
    """Return out (N, Q): each expert's rows times its matrix."""
    return functional.grouped_mm(rows_NP, weight_EPQ, offs=offset_E)


def expert_rows(
    rows_ND: Tensor,
    offset_E: Tensor,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_product,
) -> Tensor:
    """Return rows (N, D) for rows sorted by expert, unweighted."""
    hidden = product(rows_ND, gate_up_EHD.transpose(1, 2), offset_E)
    gate, up = hidden.chunk(2, dim=-1)
    activated = functional.silu(gate)
    # without gradients in place: one large temporary less
    activated = activated * up if torch.is_grad_enabled() else activated.mul_(up)
    return product(activated, down_EDF.transpose(1, 2), offset_E)


# an operator of our own, because what torch's compiler believes of torch's takes bfloat16 alone
@torch.library.custom_op("phi_kernels::grouped_product", mutates_args=())
def _product_op(rows_NP: Tensor, weight_EPQ: Tensor, offset_E: Tensor) -> Tensor:
    return grouped_product(rows_NP, weight_EPQ, offset_E)


@_product_op.register_fake
def _(rows_NP: Tensor, weight_EPQ: Tensor, offset_E: Tensor) -> Tensor:
    return rows_NP.new_empty(rows_NP.shape[0], weight_EPQ.shape[2])


@torch.library.custom_op("phi_kernels::grouped_product_backward", mutates_args=())
def _product_backward_op(
    grad_NQ: Tensor,
    rows_NP: Tensor,
    weight_EPQ: Tensor,
    offset_E: Tensor,
    needs_rows: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    # made as (E, Q, P): what lies in memory as the parameter does
    grad_rows, grad_weight = rows_NP.new_empty(0), rows_NP.new_empty(0)
    if needs_rows:
        grad_rows = grouped_product(grad_NQ, weight_EPQ.transpose(1, 2), offset_E)
    if needs_weight:
        grad_weight = functional.grouped_mm(grad_NQ.t(), rows_NP, offs=offset_E)
    return grad_rows, grad_weight


@_product_backward_op.register_fake
def _(grad_NQ, rows_NP, weight_EPQ, offset_E, needs_rows, needs_weight):
    (e, p, q), n = weight_EPQ.shape, rows_NP.shape[0]
    return (
        rows_NP.new_empty((n, p) if needs_rows else 0),
        rows_NP.new_empty((e, q, p) if needs_weight else 0),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_NQ):
    needs_rows, needs_weight, _ = ctx.needs_input_grad
    grad_rows, grad_weight = _product_backward_op(
        grad_NQ.contiguous(), *ctx.saved_tensors, needs_rows, needs_weight
    )
    return (
        grad_rows if needs_rows else None,
        grad_weight.transpose(1, 2) if needs_weight else None,
        None,
    )


_product_op.register_autograd(_gradients, setup_context=_save)
_product_backward_op.register_autograd(refuse_second_gradient)
