"""The layer where others run it: CUDA graphs, torch.compile, code that must never wait."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import phi_kernels
import pytest
import torch
from layer_on_device import (
    DEVICE,
    HALF,
    IS_DRY_RUN,
    NEEDS_DEVICE,
    NEEDS_GPU,
    Size,
    draw_experts,
    expert_mlp,
    make_problem,
)
from torch import Tensor

SIZE = Size(48, 64, 48, 4) if IS_DRY_RUN else Size(2048, 512, 768, 16)
NAMES = ("y", "x", "logit", "gate_up", "down")


def draw_inputs(*, seed: int, skew: float = 0.0) -> dict[str, Tensor]:
    """Everything that differs from one step to the next: tokens, logits, draws, gradient."""
    problem = make_problem(SIZE, HALF, seed=seed)
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=DEVICE, generator=generator).clamp(1e-6, 1 - 1e-6)

    # logits that prefer the experts that draw_experts chooses, so that skew shows in the routing
    liked_TE = torch.zeros(SIZE.t, SIZE.e, device=DEVICE)
    liked_TE.scatter_(1, draw_experts(SIZE, seed=seed, skew=skew), 4.0)
    return {
        "x": problem.x_TD.detach(),
        "logit": liked_TE + uniform(SIZE.t, SIZE.e),
        "sample": uniform(SIZE.t, 2, SIZE.e),
        "heun": uniform(SIZE.t, 2),
        "grad": problem.grad_TD,
    }


def step(inputs: dict[str, Tensor], gate_up_EHD: Tensor, down_EDF: Tensor) -> tuple[Tensor, ...]:
    """Router, plan, experts, and the gradients of all that is differentiable; y first."""
    x_TD, logit_TE = (inputs[name].detach().requires_grad_() for name in ("x", "logit"))
    weight_TK, expert_TK, _ = phi_kernels.sparsemixer(
        logit_TE, threshold=0.01, sample_TKE=inputs["sample"], heun_TK=inputs["heun"]
    )
    plan = phi_kernels.make_plan(expert_TK, num_experts=SIZE.e)
    y_TD = expert_mlp(x_TD, weight_TK, plan, gate_up_EHD, down_EDF)
    leaves = (x_TD, logit_TE, gate_up_EHD, down_EDF)
    return y_TD.detach(), *torch.autograd.grad(y_TD, leaves, inputs["grad"])


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    problem = make_problem(SIZE, HALF, seed=9)
    return problem.gate_up_EHD, problem.down_EDF


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises, once a test has turned it on."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("skew", [0.0, 8.0])
class TestOnAGpu:
    pytestmark = NEEDS_GPU

    def test_a_graph_captured_once_replays_other_routings(self, weights, skew):
        static = draw_inputs(seed=0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(static, *weights)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(static, *weights)
        routings = set()
        for seed in (1, 2, 3):
            fresh = draw_inputs(seed=seed, skew=skew)
            expected = step(fresh, *weights)
            for name, value in fresh.items():
                static[name].copy_(value)
            graph.replay()
            for name, got, right in zip(NAMES, captured, expected, strict=True):
                assert torch.equal(got, right), name
            routings.add(tuple(fresh["logit"].topk(2).indices.flatten().bincount().tolist()))
        assert len(routings) == 3

    def test_the_host_never_waits(self, weights, skew, sync_is_an_error):
        inputs = draw_inputs(seed=0, skew=skew)
        step(inputs, *weights)  # compiles
        other = draw_inputs(seed=1, skew=skew)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        got = step(other, *weights)
        torch.cuda.set_sync_debug_mode("default")
        assert all(value.isfinite().all() for value in got)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_waiting_would_have_been_found(sync_is_an_error):
    number = torch.ones(1, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchron"):
        number.item()


def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
class TestCompiled:
    pytestmark = NEEDS_DEVICE

    def test_the_layer_compiles_as_one_graph_with_the_same_answer(self, weights, backend):
        if backend == "inductor" and not has_compiler():
            pytest.skip("inductor needs a C++ compiler; none found")
        if backend == "inductor" and IS_DRY_RUN:
            pytest.skip("the interpreter's tensors are no GPU's")
        torch.compiler.reset()
        inputs = draw_inputs(seed=0)

        def layer(x_TD, logit_TE, gate_up_EHD, down_EDF):
            weight_TK, expert_TK, _ = phi_kernels.sparsemixer(
                logit_TE, threshold=0.01, sample_TKE=inputs["sample"], heun_TK=inputs["heun"]
            )
            plan = phi_kernels.make_plan(expert_TK, num_experts=SIZE.e)
            return expert_mlp(x_TD, weight_TK, plan, gate_up_EHD, down_EDF)

        compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
        results = []
        for function in (layer, compiled):
            x_TD, logit_TE = (inputs[n].detach().requires_grad_() for n in ("x", "logit"))
            y_TD = function(x_TD, logit_TE, *weights)
            leaves = (x_TD, logit_TE, *weights)
            results.append((y_TD.detach(), *torch.autograd.grad(y_TD, leaves, inputs["grad"])))
        for name, eager, got in zip(NAMES, *results, strict=True):
            # the kernels are the same; only additions around them may be fused
            assert torch.allclose(eager, got, rtol=1e-3, atol=1e-5), name
