"""The layer under test, where it runs, and problems of a given size for it.

PHI_GPU_TESTS_ON_CPU=1 runs what can run without a GPU on the CPU, small and in Triton's
interpreter, float16 in the place of bfloat16 (whose products are wrong there): a check of these
tests, not of a GPU.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NamedTuple

import phi_kernels
import pytest
import torch
from phi_kernels import DispatchPlan, reference
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
IS_DRY_RUN = not HAS_GPU and os.environ.get("PHI_GPU_TESTS_ON_CPU") == "1"
DEVICE = "cuda" if HAS_GPU else "cpu"
# the type of training; float16 in its place where the interpreter multiplies
HALF = torch.float16 if IS_DRY_RUN else torch.bfloat16
DTYPES = (HALF, torch.float16, torch.float32)

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device; this machine has none"),
]
NEEDS_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_GPU and not IS_DRY_RUN, reason="needs a CUDA device; this machine has none"
    ),
]


if IS_DRY_RUN:
    # the public functions then launch kernels for CPU tensors, which the interpreter runs
    for name in ("combine", "plan", "route", "triton_experts"):
        module = importlib.import_module(f"phi_kernels.{name}")
        module.runs_triton = lambda tensor: tensor.dtype != torch.float64

expert_mlp = phi_kernels.triton_expert_mlp


class Size(NamedTuple):
    """Tokens, width, expert width, experts, experts a token."""

    t: int
    d: int
    f: int
    e: int
    k: int = 2


PHI35_MOE = Size(4096, 4096, 6400, 16)
REAL = Size(96, 64, 96, 4) if IS_DRY_RUN else PHI35_MOE


class Problem(NamedTuple):
    """Leaves of the layer in the order of expert_mlp's arguments, and a gradient of y."""

    x_TD: Tensor
    weight_TK: Tensor
    plan: DispatchPlan
    gate_up_EHD: Tensor
    down_EDF: Tensor
    grad_TD: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.x_TD, self.weight_TK, self.gate_up_EHD, self.down_EDF]

    def arguments(self) -> tuple[Tensor, Tensor, DispatchPlan, Tensor, Tensor]:
        return self.x_TD, self.weight_TK, self.plan, self.gate_up_EHD, self.down_EDF


def draw_experts(size: Size, *, seed: int, skew: float = 0.0) -> Tensor:
    """Expert numbers (T, K), distinct for a token; skew 1 is Zipf, 0 is uniform."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    rank_E = torch.arange(1, size.e + 1, device=DEVICE, dtype=torch.float32)
    uniform_TE = torch.rand(size.t, size.e, device=DEVICE, generator=generator)
    # Gumbel-top-k draws without replacement in proportion to rank ** -skew
    score_TE = -skew * rank_E.log() - (-uniform_TE.clamp(min=1e-20).log()).log()
    return score_TE.topk(size.k, dim=1).indices


def make_problem(
    size: Size, dtype: torch.dtype, *, seed: int = 0, expert_TK: Tensor | None = None
) -> Problem:
    """Random numbers of about unit variance after each product, made on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        # in place: a second copy of 3 billion weights would not fit
        made = torch.empty(shape, device=DEVICE, dtype=dtype)
        return made.normal_(generator=generator).mul_(scale)

    x, grad = draw(size.t, size.d), draw(size.t, size.d)
    weight = torch.rand(size.t, size.k, device=DEVICE, generator=generator) + 0.25
    gate_up = draw(size.e, 2 * size.f, size.d, scale=size.d**-0.5)
    down = draw(size.e, size.d, size.f, scale=size.f**-0.5)
    if expert_TK is None:
        expert_TK = draw_experts(size, seed=seed)
    plan = reference.make_plan(expert_TK, num_experts=size.e)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, gate_up, down)]
    return Problem(leaves[0], leaves[1], plan, leaves[2], leaves[3], grad)


def answers_of(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """y and the gradient of every leaf of the layer under test, by name."""
    y_TD = expert_mlp(*problem.arguments(), **options)
    grads = torch.autograd.grad(y_TD, problem.leaves(), problem.grad_TD)
    names = ("x", "weight", "gate_up", "down")
    return {"y": y_TD.detach(), **dict(zip(names, grads, strict=True))}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Every tensor of both is equal in every bit pattern that compares equal, and has no NaN."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
