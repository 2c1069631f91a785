"""One cell of the benchmark: one implementation at one number of tokens and one routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import phi_kernels
import torch
from measure import Spread, peak_bytes, saved_bytes, time_calls
from moe_implementations import Experts
from torch import Tensor, nn

from moe.config import RouterConfig
from moe.model_config import ModelConfig
from moe.sparse.noise import token_keys
from moe.sparse.router import SparseMixerRouter

# bfloat16 rounds by 2^-8 at most, and an answer is a few roundings away from another
MOST_APART = 0.02


class Size(NamedTuple):
    """Tokens, width, expert width, experts, experts a token."""

    t: int
    d: int
    f: int
    e: int
    k: int

    def flop(self, direction: str) -> int:
        """Of the products: 6 T K D F forward, twice that backward."""
        return (6 if direction == "forward" else 12) * self.t * self.k * self.d * self.f


class Inputs(NamedTuple):
    """Leaves and a gradient of y; x in two buffers, used in turns."""

    x_TD: tuple[Tensor, Tensor]
    weight_TK: Tensor
    gate_up_EHD: Tensor
    down_EDF: Tensor
    grad_TD: Tensor


class Measured(NamedTuple):
    """Times of both directions, bytes, and how far y is from ours."""

    forward: Spread
    backward: Spread
    peak: int | None
    saved: int
    distance: float


def make_inputs(size: Size, *, dtype: torch.dtype, device: str) -> Inputs:
    """Random numbers of about unit variance after each product: zeros would save power."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.empty(shape, device=device, dtype=dtype)
        return made.normal_(generator=generator).mul_(scale)

    x = tuple(draw(size.t, size.d).requires_grad_() for _ in range(2))
    weight = torch.rand(size.t, size.k, device=device, generator=generator).requires_grad_()
    gate_up = draw(size.e, 2 * size.f, size.d, scale=size.d**-0.5).requires_grad_()
    down = draw(size.e, size.d, size.f, scale=size.f**-0.5).requires_grad_()
    return Inputs((x[0], x[1]), weight, gate_up, down, draw(size.t, size.d))


def measure_cell(
    experts: Experts,
    inputs: Inputs,
    expert_TK: Tensor,
    *,
    ours_TD: Tensor | None,
    device: str,
    repeats: int,
    seconds: float,
) -> tuple[Measured, Tensor]:
    """Return the numbers and y (detached) of the first buffer; ours_TD is what y should be."""
    x, weight_TK, gate_up_EHD, down_EDF, grad_TD = inputs

    def forward(index: int) -> Tensor:
        return experts(x[index % 2], weight_TK, expert_TK, gate_up_EHD, down_EDF)

    def step(index: int) -> Callable[[], object]:
        y_TD = forward(index)
        leaves = (x[index % 2], weight_TK, gate_up_EHD, down_EDF)
        return lambda: torch.autograd.grad(y_TD, leaves, grad_TD)

    y_TD = forward(0).detach()
    distance = 0.0 if ours_TD is None else _distance(y_TD, ours_TD)
    timing: dict[str, Any] = {"device": device, "repeats": repeats, "seconds": seconds}
    measured = Measured(
        forward=time_calls(lambda index: lambda: forward(index), **timing),
        backward=time_calls(step, **timing),
        peak=peak_bytes(lambda: step(0)(), device=device),
        saved=saved_bytes(lambda: forward(0), weights=[gate_up_EHD, down_EDF]),
        distance=distance,
    )
    return measured, y_TD


def _distance(one: Tensor, other: Tensor) -> float:
    pairs = zip(one.split(4096), other.split(4096), strict=True)
    square = sum((a.float() - b.float()).square().sum().item() for a, b in pairs)
    value = (square**0.5) / max(other.float().norm().item(), 1e-30)
    return value if value == value else float("inf")


def measure_parts(
    size: Size, expert_TK: Tensor, *, dtype: torch.dtype, device: str, repeats: int, seconds: float
) -> dict[tuple[str, str], Spread]:
    """Times of (part, direction) for router, plan and combine, each alone.

    The router is SparseMixer-v2 as trained: float32 logits, its random numbers, its gradients. The
    combine of the backward pass is the sum of the rows' gradients of x.
    """
    timing: dict[str, Any] = {"device": device, "repeats": repeats, "seconds": seconds}
    model = ModelConfig(
        hidden_size=size.d, intermediate_size=size.f, num_experts=size.e, top_k=size.k, num_layers=1
    )
    router = SparseMixerRouter(model, RouterConfig(), layer=0)
    nn.init.normal_(router.weight, std=0.02)
    router = router.to(device)
    x_TD = torch.randn(size.t, size.d, device=device).to(dtype).requires_grad_()
    key_T = token_keys(0, torch.arange(size.t, device=device), seq_len=1).flatten()
    grad_TK = torch.randn(size.t, size.k, device=device)
    plan = phi_kernels.make_plan(expert_TK, num_experts=size.e)
    rows_ND = torch.randn(size.t * size.k, size.d, device=device).to(dtype)
    weight_TK = torch.rand(size.t, size.k, device=device)

    def router_backward(_: int) -> Callable[[], object]:
        routing = router(x_TD, key_T)
        return lambda: torch.autograd.grad(routing.weight_TK, (x_TD, router.weight), grad_TK)

    def make_plan_and_tiles() -> object:
        plan = phi_kernels.make_plan(expert_TK, num_experts=size.e)
        return phi_kernels.make_tiles(plan.offset_E, num_rows=expert_TK.numel(), tile_rows=128)

    def combine() -> Tensor:
        with torch.no_grad():
            return phi_kernels.combine_rows(rows_ND, weight_TK, plan)

    combined = time_calls(lambda _: combine, **timing)
    return {
        ("router", "forward"): time_calls(lambda _: lambda: router(x_TD, key_T), **timing),
        ("router", "backward"): time_calls(router_backward, **timing),
        ("plan", "forward"): time_calls(lambda _: make_plan_and_tiles, **timing),
        ("combine", "forward"): combined,
        ("combine", "backward"): combined,
    }
