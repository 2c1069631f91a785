"""How much the layer keeps between forward and backward at 16,384 tokens of Phi-3.5-MoE."""

from __future__ import annotations

import pytest
import torch
from layer_on_device import (
    HALF,
    IS_DRY_RUN,
    NEEDS_DEVICE,
    PHI35_MOE,
    Size,
    expert_mlp,
    make_problem,
)

pytestmark = [*NEEDS_DEVICE, pytest.mark.usefixtures("gives_memory_back")]
SIZE = Size(64, 64, 96, 4) if IS_DRY_RUN else PHI35_MOE._replace(t=16_384)
# x and the pre-activation in 2 bytes, T D + T K 2F numbers: 0.906 GiB at the real size
EXACT = 2 * (SIZE.t * SIZE.d + SIZE.t * SIZE.k * 2 * SIZE.f)
# both maps, the weights; offsets and what an allocator rounds up
INDEX_ARRAYS = SIZE.t * SIZE.k * (8 + 8 + 4) + (2**10 if IS_DRY_RUN else 2**16)
LIMIT = EXACT + INDEX_ARRAYS if IS_DRY_RUN else int(0.95 * 2**30)


@pytest.mark.parametrize("recompute", [False, True])
def test_saved_activations_are_the_input_and_the_pre_activation(recompute):
    problem = make_problem(SIZE, HALF)
    weights = {t.untyped_storage().data_ptr() for t in (problem.gate_up_EHD, problem.down_EDF)}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = expert_mlp(*problem.arguments(), recompute=recompute)
    num_bytes = sum(saved.values())
    print(f"saved: {num_bytes / 2**30:.4f} GiB in {len(saved)} tensors")
    x_bytes = 2 * SIZE.t * SIZE.d
    assert num_bytes >= x_bytes  # the hooks did see what is saved
    assert num_bytes <= (x_bytes + INDEX_ARRAYS if recompute else LIMIT)
    assert y_TD.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device's allocator")
@pytest.mark.parametrize("recompute", [False, True])
def test_the_allocator_agrees(recompute):
    """What is really held after forward beside y: also what no hook sees."""
    problem = make_problem(SIZE, HALF)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y_TD = expert_mlp(*problem.arguments(), recompute=recompute)
    held = torch.cuda.memory_allocated() - before - y_TD.untyped_storage().nbytes()
    x_bytes = 2 * SIZE.t * SIZE.d  # was there before
    assert held + x_bytes <= (x_bytes + INDEX_ARRAYS if recompute else LIMIT)
    torch.autograd.grad(y_TD, problem.leaves(), problem.grad_TD)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device's allocator")
def test_nothing_is_left_after_a_step():
    problem = make_problem(SIZE, HALF)
    for count in range(2):
        y_TD = expert_mlp(*problem.arguments())
        grads = torch.autograd.grad(y_TD, problem.leaves(), problem.grad_TD)
        del y_TD, grads
        torch.cuda.synchronize()
        if count == 0:
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() == before
