"""The experts on our Triton kernels: gather, two grouped products, SwiGLU, combine, and gradients.

    forward    hidden, act = gate_up(x)         rows read where the tokens are
               y = gather_sum(act W2^T, w)      no atomic additions
    backward   grad_hidden, w act, grad w = swiglu_backward(dy, hidden)
               grad W2 = dy^T (w act)           grad W13 = grad_hidden^T x
               grad x = gather_sum(grad_hidden W13)

Between the two only x and hidden are kept, or x alone with recompute. The same launches in the same
order on the same tiles every time: two runs give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi_kernels import reference
from phi_kernels.combine import launch_gather_sum
from phi_kernels.differentiation import is_transformed, refuse_second_gradient
from phi_kernels.dispatch_plan import DispatchPlan, TileTable
from phi_kernels.gate_up import launch_gate_up
from phi_kernels.grouped_gemm import launch_grouped_gemm
from phi_kernels.plan import launch_make_tiles
from phi_kernels.swiglu_backward import launch_swiglu_backward
from phi_kernels.triton_device import aligned, on_its_device, runs_triton
from phi_kernels.tuning import Tiles, choose_tiles
from phi_kernels.weight_gradient import launch_weight_gradient

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expert_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    recompute: bool = False,
    main_gradients: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The same as reference.expert_mlp, on a GPU; differentiable once.

    bfloat16, float16 or float32 (exact products, for checking); rows of whole 16 bytes. With
    recompute the pre-activation is computed again in the backward pass instead of being kept. With
    main_gradients, float32 (E, 2F, D) and (E, D, F), the gradients of the weights are added there
    and the weights get none. ValueError for tensors that the kernels do not take.
    """
    if not runs_triton(x_TD):
        raise ValueError(
            f"the triton back-end got {x_TD.dtype} tokens on {x_TD.device}; it takes bfloat16, "
            "float16 and float32 on a GPU. Use experts=auto, which chooses by device."
        )
    _check(x_TD, gate_up_EHD, down_EDF, main_gradients)
    if is_transformed() and main_gradients is None:
        return reference.every_expert_mlp(x_TD, weight_TK, plan, gate_up_EHD, down_EDF)
    into = (None, None) if main_gradients is None else main_gradients
    y_TD, _ = torch.ops.phi_kernels.expert_mlp(
        x_TD.contiguous(), weight_TK.float().contiguous(), *plan, gate_up_EHD.contiguous(),
        down_EDF.contiguous(), *into, not recompute and torch.is_grad_enabled(),
    )  # fmt: skip
    return y_TD


def takes(x_TD: Tensor, down_EDF: Tensor) -> bool:
    """Whether expert_mlp takes these tokens and experts: a GPU, a type, rows of whole 16 bytes."""
    widths = down_EDF.shape[1:]
    is_aligned = all(width * x_TD.element_size() % 16 == 0 for width in widths)
    return runs_triton(x_TD) and x_TD.dtype in _DTYPES and is_aligned


def _check(
    x_TD: Tensor, gate_up: Tensor, down: Tensor, main_gradients: tuple[Tensor, Tensor] | None
) -> None:
    dtypes = {tensor.dtype for tensor in (x_TD, gate_up, down)}
    if len(dtypes) > 1 or x_TD.dtype not in _DTYPES:
        raise ValueError(f"the triton back-end got {dtypes}; allowed: one of {_DTYPES} for all")
    for name, width in (("D", down.shape[1]), ("F", down.shape[2])):
        if width * x_TD.element_size() % 16:
            raise ValueError(
                f"the triton back-end got {name} = {width}; the tensor memory unit reads rows of "
                f"whole 16 bytes: a multiple of {16 // x_TD.element_size()} in {x_TD.dtype}"
            )
    for main, weight in zip(main_gradients or (), (gate_up, down), strict=False):
        if main.dtype != torch.float32 or main.shape != weight.shape or not main.is_contiguous():
            raise ValueError(
                f"main_gradients: got {main.dtype} {tuple(main.shape)}; allowed: contiguous "
                f"float32 {tuple(weight.shape)}"
            )


@on_its_device
def launch_forward(
    x_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    keeps_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """Return y_TD and hidden_NH, which has no rows where it is not kept."""
    if len(x_TD) == 0:
        return torch.zeros_like(x_TD), x_TD.new_empty(0, gate_up_EHD.shape[1])
    x_TD, gate_up_EHD, down_EDF = map(aligned, (x_TD, gate_up_EHD, down_EDF))
    tiles, table = _tiles(plan, x_TD.dtype)
    hidden_NH, act_NF = launch_gate_up(
        x_TD, plan, gate_up_EHD, tiles=table, tile=tiles.gate_up, needs_hidden=keeps_hidden,
        needs_act=True,
    )  # fmt: skip
    rows_ND = launch_grouped_gemm(
        act_NF, down_EDF, plan.offset_E, is_transposed=True, tiles=table, tile=tiles.down
    )
    return launch_gather_sum(rows_ND, plan.row_of_slot_TK, weight_TK), hidden_NH


@on_its_device
def launch_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    hidden_NH: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight_TK, gate_up and down.

    hidden_NH without elements is computed again. needs: whether x, gate_up and down need theirs;
    what does not, and weights whose gradients were added to `into`, get a (0,).
    """
    needs_x, needs_gate_up, needs_down = needs
    # a tensor each: an operator's results must not share memory
    grad_x, grad_gate_up, grad_down = (x_TD.new_empty(0) for _ in range(3))
    if len(x_TD) == 0:
        if into is None:
            grad_gate_up, grad_down = torch.zeros_like(gate_up_EHD), torch.zeros_like(down_EDF)
        return torch.zeros_like(x_TD), torch.zeros_like(weight_TK), grad_gate_up, grad_down
    grad_TD, x_TD, gate_up_EHD, down_EDF = map(aligned, (grad_TD, x_TD, gate_up_EHD, down_EDF))
    tiles, table = _tiles(plan, x_TD.dtype)
    if hidden_NH.numel() == 0:
        hidden_NH, _ = launch_gate_up(
            x_TD, plan, gate_up_EHD, tiles=table, tile=tiles.gate_up, needs_hidden=True,
            needs_act=False,
        )  # fmt: skip
    grad_hidden_NH, weighted_act_NF, grad_weight_TK = launch_swiglu_backward(
        grad_TD, weight_TK, plan, hidden_NH, down_EDF, tiles=table, tile=tiles.swiglu_backward
    )
    if needs_down:
        made = launch_weight_gradient(
            grad_TD, weighted_act_NF, plan, left_is_tokens=True, right_is_tokens=False,
            tile=tiles.weight_gradient, into=into and into[1],
        )  # fmt: skip
        grad_down = made if into is None else grad_down
    del weighted_act_NF
    if needs_gate_up:
        made = launch_weight_gradient(
            grad_hidden_NH, x_TD, plan, left_is_tokens=False, right_is_tokens=True,
            tile=tiles.weight_gradient, into=into and into[0],
        )  # fmt: skip
        grad_gate_up = made if into is None else grad_gate_up
    if needs_x:
        grad_rows_ND = launch_grouped_gemm(
            grad_hidden_NH, gate_up_EHD, plan.offset_E, is_transposed=False, tiles=table,
            tile=tiles.input_gradient,
        )  # fmt: skip
        grad_x = launch_gather_sum(grad_rows_ND, plan.row_of_slot_TK, None)
    return grad_x, grad_weight_TK, grad_gate_up, grad_down


def _tiles(plan: DispatchPlan, dtype: torch.dtype) -> tuple[Tiles, TileTable]:
    num_rows, num_experts = plan.slot_of_row_N.numel(), plan.offset_E.numel()
    tiles = choose_tiles(dtype, num_rows=num_rows, num_experts=num_experts)
    return tiles, launch_make_tiles(plan.offset_E, num_rows, tiles.down.rows)


@torch.library.custom_op("phi_kernels::expert_mlp", mutates_args=())
def _forward_op(
    x_TD: Tensor,
    weight_TK: Tensor,
    slot_of_row_N: Tensor,
    row_of_slot_TK: Tensor,
    offset_E: Tensor,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    main_gate_up_EHD: Tensor | None,
    main_down_EDF: Tensor | None,
    keeps_hidden: bool,
) -> tuple[Tensor, Tensor]:
    plan = DispatchPlan(slot_of_row_N, row_of_slot_TK, offset_E)
    return launch_forward(x_TD, weight_TK, plan, gate_up_EHD, down_EDF, keeps_hidden=keeps_hidden)


@_forward_op.register_fake
def _(
    x_TD, weight_TK, slot_of_row_N, row_of_slot_TK, offset_E, gate_up_EHD, down_EDF,
    main_gate_up_EHD, main_down_EDF, keeps_hidden,
):  # fmt: skip
    num_rows = slot_of_row_N.shape[0] if keeps_hidden else 0
    return torch.empty_like(x_TD), x_TD.new_empty(num_rows, gate_up_EHD.shape[1])


@torch.library.custom_op("phi_kernels::expert_mlp_backward", mutates_args=())
def _backward_op(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    slot_of_row_N: Tensor,
    row_of_slot_TK: Tensor,
    offset_E: Tensor,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    hidden_NH: Tensor,
    needs_x: bool,
    needs_gate_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = DispatchPlan(slot_of_row_N, row_of_slot_TK, offset_E)
    needs = (needs_x, needs_gate_up, needs_down)
    return launch_backward(
        grad_TD, x_TD, weight_TK, plan, gate_up_EHD, down_EDF, hidden_NH, needs=needs
    )


@_backward_op.register_fake
def _(
    grad_TD, x_TD, weight_TK, slot_of_row_N, row_of_slot_TK, offset_E, gate_up_EHD, down_EDF,
    hidden_NH, needs_x, needs_gate_up, needs_down,
):  # fmt: skip
    wanted = ((x_TD, needs_x), (gate_up_EHD, needs_gate_up), (down_EDF, needs_down))
    x, gate_up, down = (
        torch.empty_like(t) if is_needed else t.new_empty(0) for t, is_needed in wanted
    )
    return x, torch.empty_like(weight_TK), gate_up, down


@torch.library.custom_op(
    "phi_kernels::expert_mlp_backward_into", mutates_args=("main_gate_up_EHD", "main_down_EDF")
)
def _backward_into_op(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    slot_of_row_N: Tensor,
    row_of_slot_TK: Tensor,
    offset_E: Tensor,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    hidden_NH: Tensor,
    main_gate_up_EHD: Tensor,
    main_down_EDF: Tensor,
    needs_x: bool,
    needs_gate_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor]:
    plan = DispatchPlan(slot_of_row_N, row_of_slot_TK, offset_E)
    grad_x, grad_weight_TK, _, _ = launch_backward(
        grad_TD, x_TD, weight_TK, plan, gate_up_EHD, down_EDF, hidden_NH,
        needs=(needs_x, needs_gate_up, needs_down), into=(main_gate_up_EHD, main_down_EDF),
    )  # fmt: skip
    return grad_x, grad_weight_TK


@_backward_into_op.register_fake
def _(
    grad_TD, x_TD, weight_TK, slot_of_row_N, row_of_slot_TK, offset_E, gate_up_EHD, down_EDF,
    hidden_NH, main_gate_up_EHD, main_down_EDF, needs_x, needs_gate_up, needs_down,
):  # fmt: skip
    grad_x = torch.empty_like(x_TD) if needs_x else x_TD.new_empty(0)
    return grad_x, torch.empty_like(weight_TK)


def _save(ctx, inputs, output) -> None:
    *tensors, main_gate_up, main_down, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    # not saved tensors: the backward pass writes to them
    ctx.into = None if main_gate_up is None else (main_gate_up, main_down)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_TD, _):
    none = (None,) * 10
    if grad_TD is None:
        return none
    arguments = (grad_TD.contiguous(), *ctx.saved_tensors)
    needs_x, _, _, _, _, needs_gate_up, needs_down = ctx.needs_input_grad[:7]
    if ctx.into is not None:
        grad_x, grad_weight_TK = torch.ops.phi_kernels.expert_mlp_backward_into(
            *arguments, *ctx.into, needs_x, needs_gate_up, needs_down
        )
        return grad_x if needs_x else None, grad_weight_TK, *none[2:]
    grad_x, grad_weight_TK, grad_gate_up, grad_down = torch.ops.phi_kernels.expert_mlp_backward(
        *arguments, needs_x, needs_gate_up, needs_down
    )
    return (
        grad_x if needs_x else None, grad_weight_TK, None, None, None,
        grad_gate_up if needs_gate_up else None, grad_down if needs_down else None, *none[7:],
    )  # fmt: skip


_forward_op.register_autograd(_gradients, setup_context=_save)
_backward_op.register_autograd(refuse_second_gradient)
