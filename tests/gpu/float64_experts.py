"""The expert arithmetic and all its gradients in float64, one expert and a few rows at a time.

Written out by hand, so that 16 experts of 4096 x 6400 need one expert's float64 weights and not
all, and no graph; the test beside it holds it to the reference's own derivatives.
"""

from __future__ import annotations

import math

import torch
from layer_on_device import Problem
from torch import Tensor

_ROWS = 8192  # at once


def errors(
    problem: Problem, got: dict[str, Tensor], *, sums: torch.dtype = torch.float64
) -> dict[str, float]:
    """Norm of the difference over the norm of the exact answer, for y, x, weight, gate_up, down.

    got holds y and the gradients by these names; infinite for a NaN. sums is the type in which the
    exact y and gradient of x are kept: float32 where they have 2^31 elements and 16-bit answers.
    """
    x_TD, weight_TK, plan, gate_up_EHD, down_EDF = problem.arguments()
    slot_of_row_N, top_k = plan.slot_of_row_N, plan.top_k
    exact = {
        "y": torch.zeros_like(x_TD, dtype=sums, requires_grad=False),
        "x": torch.zeros_like(x_TD, dtype=sums, requires_grad=False),
        "weight": torch.zeros(weight_TK.numel(), dtype=torch.float64, device=x_TD.device),
    }
    squares = {"gate_up": [0.0, 0.0], "down": [0.0, 0.0]}
    start = 0
    with torch.no_grad():
        for expert, end in enumerate(plan.offset_E.tolist()):
            weights = gate_up_EHD[expert].double(), down_EDF[expert].double()
            grads = torch.zeros_like(weights[0]), torch.zeros_like(weights[1])
            for first in range(start, end, _ROWS):
                slot_R = slot_of_row_N[first : min(end, first + _ROWS)]
                token_R = slot_R // top_k
                _add_rows(problem, exact, slot_R, token_R, weights, grads)
            for name, grad in zip(("gate_up", "down"), grads, strict=True):
                difference = got[name][expert].double() - grad
                squares[name][0] += difference.square().sum().item()
                squares[name][1] += grad.square().sum().item()
            start = end
    found = {name: math.sqrt(a) / math.sqrt(max(b, 1e-60)) for name, (a, b) in squares.items()}
    for name, right in exact.items():
        # in pieces: a difference of 2^31 elements in float64 has 16 GiB
        pairs = zip(got[name].reshape(right.shape).split(_ROWS), right.split(_ROWS), strict=True)
        wrong, whole = 0.0, 0.0
        for one, other in pairs:
            wrong += (one.double() - other.double()).square().sum().item()
            whole += other.double().square().sum().item()
        found[name] = math.sqrt(wrong) / math.sqrt(max(whole, 1e-60))
    return {name: value if value == value else math.inf for name, value in found.items()}


def _add_rows(
    problem: Problem,
    exact: dict[str, Tensor],
    slot_R: Tensor,
    token_R: Tensor,
    weights: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
) -> None:
    """Add what some rows of one expert contribute to every answer."""
    gate_up_HD, down_DF = weights
    scale_R1 = problem.weight_TK.flatten()[slot_R].double()[:, None]
    x_RD, grad_RD = problem.x_TD[token_R].double(), problem.grad_TD[token_R].double()
    gate_RF, up_RF = (x_RD @ gate_up_HD.T).chunk(2, dim=1)
    sigmoid_RF = gate_RF.sigmoid()
    silu_RF = gate_RF * sigmoid_RF
    act_RF = silu_RF * up_RF
    out_RD = act_RF @ down_DF.T
    exact["y"].index_add_(0, token_R, (scale_R1 * out_RD).to(exact["y"].dtype))
    exact["weight"][slot_R] = (grad_RD * out_RD).sum(dim=1)
    grad_out_RD = scale_R1 * grad_RD
    grads[1].addmm_(grad_out_RD.T, act_RF)
    grad_act_RF = grad_out_RD @ down_DF
    grad_gate_RF = grad_act_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
    grad_hidden_RH = torch.cat([grad_gate_RF, grad_act_RF * silu_RF], dim=1)
    grads[0].addmm_(grad_hidden_RH.T, x_RD)
    exact["x"].index_add_(0, token_R, (grad_hidden_RH @ gate_up_HD).to(exact["x"].dtype))
