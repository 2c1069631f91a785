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


# error relative to the whole tensor's norm. Every answer passes through one to three products whose
# results are rounded to the dtype (unit roundoff u: 2^-53, 2^-24, 2^-11, 2^-8); independent
# roundings add like a random walk, so a few u: 8 of them leaves room for sums of few terms
TOLERANCE = {
    torch.float64: 8 * 2.0**-53,
    torch.float32: 8 * 2.0**-24,
    torch.float16: 8 * 2.0**-11,
    torch.bfloat16: 8 * 2.0**-8,
}


def distance(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact answer; infinite for a NaN."""
    difference = (got.double() - exact.double()).norm()
    ratio = (difference / exact.double().norm().clamp(min=1e-30)).item()
    return ratio if ratio == ratio else float("inf")
