"""Routings and widths at the edges of expert arithmetic, and how near an answer has to be.

Needs torch and phi_kernels only: the tests on a GPU use it too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from phi_kernels import DispatchPlan, reference
from torch import Tensor


class Case(NamedTuple):
    """Tokens' choices (T x K expert numbers) among num_experts, and the widths D and F."""

    experts: list[list[int]]
    num_experts: int
    d: int
    f: int


def _random(num_tokens: int, top_k: int, num_experts: int, *, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.rand(num_tokens, num_experts, generator=generator)
    return score_TE.topk(top_k, dim=1).indices.tolist()


# name says the edge
CASES = {
    "one token": Case([[2, 0]], 4, 32, 48),
    "one expert": Case([[0]] * 5, 1, 32, 48),
    "all on one expert, the others empty": Case([[1]] * 70, 4, 32, 48),
    "both slots on one expert": Case([[1, 1], [2, 2], [1, 1]], 3, 32, 48),
    "every expert for every token": Case([[0, 1, 2], [2, 1, 0]] * 3, 3, 32, 48),
    "no token": Case([], 4, 32, 48),
    "first and last expert empty": Case([[1, 2], [2, 1], [2, 3]] * 4, 5, 32, 48),
    "rows around a tile's 64": Case([[0]] * 63 + [[1]] * 64 + [[2]] * 65, 3, 32, 48),
    "rows around a tile's 128": Case([[0]] * 127 + [[1]] * 128 + [[2]] * 129, 3, 32, 48),
    "widths that no tile divides": Case(_random(37, 2, 5, seed=1), 5, 72, 40),
    "widths above one tile": Case(_random(50, 2, 3, seed=2), 3, 200, 136),
    "many experts, uneven": Case(_random(90, 4, 20, seed=3), 20, 32, 48),
}


class Inputs(NamedTuple):
    """Leaves with gradients, in the order of expert_mlp's arguments, and a gradient of y."""

    x_TD: Tensor
    weight_TK: Tensor  # float32, or float64 for float64 inputs
    plan: DispatchPlan
    gate_up_EHD: Tensor
    down_EDF: Tensor
    grad_TD: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.x_TD, self.weight_TK, self.gate_up_EHD, self.down_EDF]


def make_inputs(case: Case, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs of a case; the same numbers for every dtype, rounded once."""
    generator = torch.Generator().manual_seed(seed)
    top_k = len(case.experts[0]) if case.experts else 2
    expert_TK = torch.tensor(case.experts, dtype=torch.int64).view(-1, top_k)
    num_tokens = len(expert_TK)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight = draw(num_tokens, case.d), draw(num_tokens, top_k).abs()
    # about unit variance after each product, as in a trained layer
    gate_up = draw(case.num_experts, 2 * case.f, case.d, scale=case.d**-0.5)
    down = draw(case.num_experts, case.d, case.f, scale=case.f**-0.5)
    grad = draw(num_tokens, case.d)
    weight_dtype = torch.promote_types(dtype, torch.float32)
    x, gate_up, down = (t.to(device, dtype).requires_grad_() for t in (x, gate_up, down))
    weight = weight.to(device, weight_dtype).requires_grad_()
    plan = reference.make_plan(expert_TK.to(device), num_experts=case.num_experts)
    return Inputs(x, weight, plan, gate_up, down, grad.to(device, dtype))


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers, exactly, as float64 leaves."""
    as_double = [t.detach().double().requires_grad_() for t in inputs.leaves()]
    x, weight, gate_up, down = as_double
    return Inputs(x, weight, inputs.plan, gate_up, down, inputs.grad_TD.double())


def answers(expert_mlp, inputs: Inputs) -> dict[str, Tensor]:
    """y and the gradient of every input, by name."""
    y_TD = expert_mlp(
        inputs.x_TD, inputs.weight_TK, inputs.plan, inputs.gate_up_EHD, inputs.down_EDF
    )
    grads = torch.autograd.grad(y_TD, inputs.leaves(), inputs.grad_TD)
    names = ("x", "weight", "gate_up", "down")
    return {"y": y_TD.detach(), **dict(zip(names, grads, strict=True))}


# error relative to the size of what was summed (`sizes`). Every answer passes through one to three
# products whose results are rounded to the dtype (unit roundoff u: 2^-53, 2^-24, 2^-11, 2^-8);
# independent roundings add like a random walk, so a few u: 8 of them for sums of few terms
TOLERANCE = {
    torch.float64: 8 * 2.0**-53,
    torch.float32: 8 * 2.0**-24,
    torch.float16: 8 * 2.0**-11,
    torch.bfloat16: 8 * 2.0**-8,
}


def tolerance(inputs: Inputs) -> float:
    """TOLERANCE of the inputs' dtype, with room for their longest sum in one accumulator.

    A library may add n terms one after the other, or in as many accumulators as its processor has
    lanes. The worst is one: its n partial sums grow like a random walk and are rounded each, which
    together is at most the root of n roundings of the accumulator, whose type is at least float32.
    """
    dtype, offset_E = inputs.x_TD.dtype, inputs.plan.offset_E
    rows_E = offset_E.diff(prepend=offset_E.new_zeros(1))
    longest = max(*inputs.gate_up_EHD.shape[1:], int(rows_E.max()))
    return TOLERANCE[dtype] + longest**0.5 * (2.0**-53 if dtype == torch.float64 else 2.0**-24)


def sizes(inputs: Inputs) -> dict[str, float]:
    """How large what is summed is, for each of `answers`; inputs are float64.

    An answer's element is a sum of products. Rounding moves it by a few roundings of its terms, so
    by their root of summed squares, also where the terms cancel and the sum is far smaller. That is
    common where an answer has few elements, as a few routing weights have. The size is the norm
    over the tensor of those roots, or of the answer where that is larger.
    """
    x_TD, weight_TK, plan, gate_up_EHD, down_EDF, grad_TD = (
        leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in inputs
    )
    squares = {"y": torch.zeros_like(x_TD), "x": torch.zeros_like(x_TD)}
    squares["weight"] = torch.zeros(weight_TK.numel(), dtype=x_TD.dtype, device=x_TD.device)
    for key, weight in (("gate_up", gate_up_EHD), ("down", down_EDF)):
        squares[key] = torch.zeros_like(weight)
    start = 0
    for e, end in enumerate(plan.offset_E.tolist()):
        slot_R = plan.slot_of_row_N[start:end]
        token_R, start = slot_R // plan.top_k, end
        x_RD, grad_RD, weight_R1 = (
            x_TD[token_R],
            grad_TD[token_R],
            weight_TK.flatten()[slot_R, None],
        )
        gate_RF, up_RF = (x_RD @ gate_up_EHD[e].T).chunk(2, dim=-1)
        silu_RF = gate_RF * gate_RF.sigmoid()
        slope_RF = gate_RF.sigmoid() * (1 + gate_RF - silu_RF)
        act_RF = silu_RF * up_RF
        dout_RD = weight_R1 * grad_RD
        dact_RF = dout_RD @ down_EDF[e]
        dhidden_RH = torch.cat([dact_RF * up_RF * slope_RF, dact_RF * silu_RF], dim=-1)
        y_RD = weight_R1**2 * (act_RF**2 @ down_EDF[e].T ** 2)
        squares["y"].index_add_(0, token_R, y_RD)
        squares["x"].index_add_(0, token_R, dhidden_RH**2 @ gate_up_EHD[e] ** 2)
        squares["weight"][slot_R] = (grad_RD**2 * (act_RF @ down_EDF[e].T) ** 2).sum(dim=-1)
        squares["gate_up"][e] = dhidden_RH.T**2 @ x_RD**2
        squares["down"][e] = dout_RD.T**2 @ act_RF**2
    return {key: square.sum().sqrt().item() for key, square in squares.items()}


def exact_answers(reference_mlp, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The reference's `answers` in float64, and the size of each: the larger of norm and terms."""
    doubles = in_float64(inputs)
    exact, summed = answers(reference_mlp, doubles), sizes(doubles)
    return exact, {key: max(summed[key], exact[key].norm().item()) for key in exact}


def activation_dot_size(inputs: Inputs, hidden_NH: Tensor) -> float:
    """The size of the sums act . (down^T grad), the routing weights' gradients; in float64."""
    gate_NF, up_NF = hidden_NH.chunk(2, dim=-1)
    grad_ND = reference.gather_rows(inputs.grad_TD, inputs.plan)
    grad_act_NF = reference.grouped_gemm(
        grad_ND, inputs.down_EDF, inputs.plan.offset_E, is_transposed=False
    )
    return (gate_NF * gate_NF.sigmoid() * up_NF * grad_act_NF).norm().item()


def distance(got: Tensor, exact: Tensor, *, size: float | None = None) -> float:
    """Norm of the difference over size, or over the exact answer's norm; infinite for a NaN."""
    norm = exact.double().norm().item() if size is None else size
    ratio = (got.double() - exact.double()).norm().item() / max(norm, 1e-30)
    return ratio if ratio == ratio else float("inf")
