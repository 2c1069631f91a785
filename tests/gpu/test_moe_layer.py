"""The whole sparse layer (jitter, router, dispatch, experts) on the device, as training runs it."""

from __future__ import annotations

import pytest
import torch
from expert_cases import TOLERANCE, distance
from layer_on_device import DEVICE, HALF, HAS_GPU, IS_DRY_RUN, NEEDS_DEVICE

from moe.config import ExpertsConfig, RouterConfig
from moe.model_config import ModelConfig
from moe.sparse.layer import MoELayer
from moe.sparse.noise import token_keys

pytestmark = NEEDS_DEVICE
WIDTHS = (32, 48, 4) if IS_DRY_RUN else (256, 400, 16)
MODEL = ModelConfig(
    hidden_size=WIDTHS[0], intermediate_size=WIDTHS[1], num_experts=WIDTHS[2], num_layers=1
)


def run(backend: str, router: str, dtype: torch.dtype, *, is_training: bool, seed: int = 0):
    """y and the gradient of x and of every parameter, under autocast to a 16-bit dtype."""
    config = RouterConfig(name=router, mask_threshold=0.2)
    layer = MoELayer(MODEL, config, ExpertsConfig(backend=backend), layer=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    layer = layer.to(DEVICE, dtype if dtype == torch.float64 else torch.float32)
    generator.manual_seed(seed + 1)
    shape = (2, 16 if IS_DRY_RUN else 64, MODEL.hidden_size)
    x_BSD, grad_BSD = (torch.randn(shape, generator=generator) for _ in range(2))
    x_BSD = x_BSD.to(DEVICE, layer.router.weight.dtype).requires_grad_()
    key_BS = token_keys(0, torch.arange(2, device=DEVICE), seq_len=shape[1])
    with torch.autocast(DEVICE, dtype=HALF, enabled=dtype == HALF):
        y_BSD, routing = layer(x_BSD, key_BS if is_training else None)
    (y_BSD * grad_BSD.to(y_BSD)).sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y_BSD.detach(), "x": x_BSD.grad, **grads}, routing


@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("router", ["sparsemixer", "topk"])
def test_the_back_end_that_auto_chooses_is_the_float64_reference(router, is_training):
    exact, reference_routing = run("reference", router, torch.float64, is_training=is_training)
    for dtype in (torch.float32, HALF):
        got, routing = run("auto", router, dtype, is_training=is_training)
        # float32 logits on both sides of a threshold would make another layer of it
        assert torch.equal(routing.expert_TK, reference_routing.expert_TK)
        limit = {torch.float32: 1e-5, HALF: TOLERANCE[HALF]}[dtype]
        found = {key: distance(got[key], exact[key]) for key in got}
        assert [key for key, value in found.items() if not value <= limit] == []


@pytest.mark.parametrize("router", ["sparsemixer", "topk"])
def test_two_runs_of_the_layer_are_equal_in_every_bit(router):
    one, other = (run("auto", router, HALF, is_training=True)[0] for _ in range(2))
    # the router's own weight gradient is one dense product of torch
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device; this machine has none")
@pytest.mark.parametrize("router", ["sparsemixer", "topk"])
def test_the_host_never_waits_for_the_layer(router, monkeypatch):
    layer = MoELayer(MODEL, RouterConfig(name=router), ExpertsConfig(backend="auto"), layer=0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer = layer.to(DEVICE)
    x_BSD = torch.randn(2, 256, MODEL.hidden_size, device=DEVICE, requires_grad=True)
    key_BS = token_keys(0, torch.arange(2, device=DEVICE), seq_len=256)

    def step() -> None:
        with torch.autocast(DEVICE, dtype=HALF):
            y_BSD, _ = layer(x_BSD, key_BS)
        y_BSD.sum().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x_BSD.grad).all()
