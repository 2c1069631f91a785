"""The layer of Phi-3.5-MoE (D 4096, F 6400, 16 experts, top 2) against float64."""

from __future__ import annotations

import pytest
import torch
from expert_cases import TOLERANCE
from float64_experts import errors
from layer_on_device import (
    DEVICE,
    DTYPES,
    HALF,
    NEEDS_DEVICE,
    REAL,
    answers_of,
    assert_same_bits,
    draw_experts,
    make_problem,
)
from phi_kernels import reference

pytestmark = [*NEEDS_DEVICE, pytest.mark.usefixtures("gives_memory_back")]

ROUTINGS = {
    "uniform": lambda size: draw_experts(size, seed=1),
    "zipf": lambda size: draw_experts(size, seed=2, skew=1.0),
    "all to one": lambda size: torch.zeros(size.t, size.k, dtype=torch.int64, device=DEVICE),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.usefixtures("poisoned")
def test_bfloat16_is_as_near_to_float64_as_torchs_own_products(routing):
    """Within the tolerance, and no more than twice as far away as the same formula in torch.

    A tolerance alone hides a tile that is wrong in a few elements of a large tensor.
    """
    problem = make_problem(REAL, HALF, expert_TK=ROUTINGS[routing](REAL))
    found = errors(problem, answers_of(problem))
    y_TD = reference.expert_mlp(*problem.arguments())
    grads = torch.autograd.grad(y_TD, problem.leaves(), problem.grad_TD)
    names = ("y", "x", "weight", "gate_up", "down")
    by_torch = errors(problem, dict(zip(names, (y_TD.detach(), *grads), strict=True)))
    print({name: f"{found[name]:.2e} (torch {by_torch[name]:.2e})" for name in names})
    assert [name for name in names if not found[name] <= TOLERANCE[HALF]] == []
    assert [name for name in names if not found[name] <= 2 * by_torch[name]] == []


@pytest.mark.parametrize("dtype", [d for d in dict.fromkeys(DTYPES) if d != HALF], ids=str)
def test_other_types_at_the_real_widths(dtype):
    # fewer tokens: float32 has no tensor cores
    size = REAL._replace(t=min(REAL.t, 512))
    found = errors(problem := make_problem(size, dtype), answers_of(problem))
    # float32: chains of 4096 and more additions, 0.3 sqrt(6400) roundoffs each, a few in a row
    limit = TOLERANCE[dtype] * (16 if dtype == torch.float32 else 1)
    assert [name for name, value in found.items() if not value <= limit] == []


def test_two_hundred_runs_are_equal_in_every_bit():
    """A race between the loads and the tensor cores shows once in many runs, if at all."""
    problem = make_problem(REAL, HALF, expert_TK=ROUTINGS["zipf"](REAL))
    first = answers_of(problem)
    for _ in range(200 if DEVICE == "cuda" else 2):
        assert_same_bits(first, answers_of(problem))


def test_two_runs_and_a_recomputed_one_are_equal_in_every_bit():
    problem = make_problem(REAL, HALF, expert_TK=ROUTINGS["zipf"](REAL))
    first = answers_of(problem)
    assert_same_bits(first, answers_of(problem))
    assert_same_bits(first, answers_of(problem, recompute=True))
