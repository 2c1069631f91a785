"""Routers, plan and tiles on the device: against float64, exactly, and twice the same."""

from __future__ import annotations

import phi_kernels
import pytest
import torch
from layer_on_device import DEVICE, IS_DRY_RUN, NEEDS_DEVICE
from phi_kernels import reference
from torch import Tensor

pytestmark = NEEDS_DEVICE
TOKENS = 300 if IS_DRY_RUN else 65536
# of a thousand tokens, one may lie so near a threshold that float32 decides otherwise
MOST_UNDECIDED = 1e-3


def draws(num_experts: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logit_TE, sample_TKE, heun_TK and a gradient of the weights."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logit_TE = torch.randn(TOKENS, num_experts, device=DEVICE, generator=generator)
    sample_TKE = torch.rand(TOKENS, 2, num_experts, device=DEVICE, generator=generator)
    sample_TKE = sample_TKE.clamp(1e-6, 1 - 1e-6)
    heun_TK = torch.rand(TOKENS, 2, device=DEVICE, generator=generator)
    return logit_TE, sample_TKE, heun_TK, torch.randn(TOKENS, 2, device=DEVICE, generator=generator)


def run(route, logit_TE: Tensor, grad_TK: Tensor) -> list[Tensor]:
    """Weights, experts, counts, and the gradient of the logits."""
    logit_TE = logit_TE.clone().requires_grad_()
    weight_TK, expert_TK, count_E = route(logit_TE)
    (grad_TE,) = torch.autograd.grad(weight_TK, logit_TE, grad_TK.to(weight_TK.dtype))
    return [weight_TK.detach(), expert_TK, count_E, grad_TE]


def assert_close_to_float64(route, logit_TE: Tensor, grad_TK: Tensor, reference_route) -> None:
    weight_TK, expert_TK, count_E, grad_TE = run(route, logit_TE, grad_TK)
    exact = run(reference_route, logit_TE.double(), grad_TK)
    assert weight_TK.dtype == grad_TE.dtype == torch.float32
    assert expert_TK.dtype == count_E.dtype == torch.int64
    assert torch.equal(count_E, torch.bincount(expert_TK.flatten(), minlength=len(count_E)))
    is_wrong_T = (
        (expert_TK != exact[1]).any(dim=1)
        | ~((weight_TK - exact[0]).abs() < 1e-5).all(dim=1)
        | ~((grad_TE - exact[3]).abs() < 1e-5).all(dim=1)
    )
    assert is_wrong_T.double().mean().item() <= MOST_UNDECIDED


@pytest.mark.parametrize("is_sampled", [False, True], ids=["largest", "sampled"])
@pytest.mark.parametrize("threshold", [0.01, 0.2])
@pytest.mark.parametrize("num_experts", [2, 16, 60])
@pytest.mark.usefixtures("poisoned")
def test_sparsemixer_is_the_float64_reference(num_experts, threshold, is_sampled):
    logit_TE, sample_TKE, heun_TK, grad_TK = draws(num_experts)
    drawn = {"sample_TKE": sample_TKE, "heun_TK": heun_TK} if is_sampled else {}

    def exact(logit_TE: Tensor):
        drawn64 = {name: value.double() for name, value in drawn.items()}
        return reference.sparsemixer(logit_TE, threshold=threshold, **drawn64)

    def route(logit_TE: Tensor):
        return phi_kernels.sparsemixer(logit_TE, threshold=threshold, **drawn)

    assert_close_to_float64(route, logit_TE, grad_TK, exact)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("num_experts", [2, 16, 60])
@pytest.mark.usefixtures("poisoned")
def test_top_k_softmax_is_the_float64_reference(num_experts, renormalise):
    logit_TE, _, _, grad_TK = draws(num_experts)
    options = {"top_k": 2, "renormalise": renormalise}
    assert_close_to_float64(
        lambda logit: phi_kernels.top_k_softmax(logit, **options),
        logit_TE,
        grad_TK,
        lambda logit: reference.top_k_softmax(logit, **options),
    )


@pytest.mark.parametrize("router", ["sparsemixer", "top_k_softmax"])
def test_two_runs_of_a_router_are_equal_in_every_bit(router):
    logit_TE, sample_TKE, heun_TK, grad_TK = draws(16)

    def route(logit_TE: Tensor):
        if router == "top_k_softmax":
            return phi_kernels.top_k_softmax(logit_TE, top_k=2, renormalise=True)
        return phi_kernels.sparsemixer(
            logit_TE, threshold=0.1, sample_TKE=sample_TKE, heun_TK=heun_TK
        )

    one, other = (run(route, logit_TE, grad_TK) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


ROUTINGS = {
    "uniform": lambda e: torch.randint(e, (TOKENS, 2), device=DEVICE),
    "all to one": lambda e: torch.full((TOKENS, 2), e - 1, device=DEVICE),
    "one token": lambda e: torch.zeros(1, 2, dtype=torch.int64, device=DEVICE),
    "no token": lambda e: torch.zeros(0, 2, dtype=torch.int64, device=DEVICE),
}


@pytest.mark.parametrize("num_experts", [1, 16, 61])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.usefixtures("poisoned")
def test_the_plan_and_its_tiles_are_exactly_the_references(routing, num_experts):
    expert_TK = ROUTINGS[routing](num_experts)
    plan = phi_kernels.make_plan(expert_TK, num_experts=num_experts)
    exact = reference.make_plan(expert_TK, num_experts=num_experts)
    for got, right in zip(plan, exact, strict=True):
        assert got.dtype == right.dtype
        assert torch.equal(got, right)
    for tile_rows in (64, 128):
        num_rows = expert_TK.numel()
        tiles = phi_kernels.make_tiles(plan.offset_E, num_rows=num_rows, tile_rows=tile_rows)
        right = reference.make_tiles(plan.offset_E, num_rows=num_rows, tile_rows=tile_rows)
        assert all(torch.equal(a, b) for a, b in zip(tiles, right, strict=True))
