"""The layer of Phi-3.5-MoE (D 4096, F 6400, 16 experts, top 2) and tensors beyond 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from expert_cases import TOLERANCE
from float64_experts import errors
from layer_on_device import (
    DEVICE,
    DTYPES,
    HALF,
    IS_DRY_RUN,
    NEEDS_DEVICE,
    REAL,
    Size,
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


def test_two_runs_and_a_recomputed_one_are_equal_in_every_bit():
    problem = make_problem(REAL, HALF, expert_TK=ROUTINGS["zipf"](REAL))
    first = answers_of(problem)
    assert_same_bits(first, answers_of(problem))
    assert_same_bits(first, answers_of(problem, recompute=True))


# each has more than 2^31 elements in what its name says, and little work
BEYOND_32_BITS = {
    "hidden": Size(98_304, 64, 6400, 4),  # N * 2F = 2.5e9
    "rows": Size(98_304, 12_288, 64, 4),  # N * D = 2.4e9, T * D = 1.2e9
    "tokens": Size(262_144, 8_704, 64, 4, 1),  # T * D = N * D = 2.3e9
    "weights": Size(512, 4096, 6400, 48),  # E * 2F * D = 2.5e9
}
SMALLER = {
    "hidden": Size(64, 32, 64, 4),
    "rows": Size(64, 64, 32, 4),
    "tokens": Size(64, 64, 32, 4, 1),
    "weights": Size(24, 32, 32, 12),
}


@pytest.mark.parametrize("name", BEYOND_32_BITS)
def test_addresses_beyond_32_bits(name):
    size = (SMALLER if IS_DRY_RUN else BEYOND_32_BITS)[name]
    num_rows = size.t * size.k
    elements = {
        "hidden": num_rows * 2 * size.f,
        "rows": num_rows * size.d,
        "tokens": size.t * size.d,
        "weights": size.e * 2 * size.f * size.d,
    }[name]
    assert IS_DRY_RUN or elements > 2**31
    if not IS_DRY_RUN:
        # inputs, their gradients, hidden and activation and theirs, in 2 bytes; float64 sums
        weights = 3 * size.e * size.f * size.d
        needed = 2 * (4 * size.t * size.d + 2 * weights + num_rows * (6 * size.f + 2 * size.d))
        needed += 8 * 4 * size.t * size.d + 2**32
        free = torch.cuda.mem_get_info()[0]
        if free < needed:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} free")
    problem = make_problem(size, HALF)
    found = errors(problem, answers_of(problem))
    assert [key for key, value in found.items() if not value <= TOLERANCE[HALF]] == []
