"""The CPU's expert arithmetic against the reference: outputs and every gradient."""

from __future__ import annotations

import phi_kernels
import pytest
import torch

E, D, F = 5, 24, 40
# rows of each expert; the comment names the edge
COUNTS = [
    (0, 0, 0, 0, 1),  # one token, at the last expert
    (1, 0, 0, 0, 0),  # one token, at the first
    (3, 8, 9, 16, 17),  # around the sizes at which rows are rounded up
    (64, 65, 0, 33, 31),  # larger steps, an empty expert in the middle
    (0, 70, 0, 0, 0),  # everything on one expert
    (40, 0, 0, 0, 7),  # what is computed beyond the last expert's rows has no rows to read
]
# relative to the largest number: float64 and float32 sum in another order than the reference;
# bfloat16 rounds the pre-activation, the activation and the output to 8 bits each
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2}


def make(counts, dtype):
    generator = torch.Generator().manual_seed(sum(counts))
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rows, gate_up, down = draw(sum(counts), D), 0.3 * draw(E, 2 * F, D), 0.3 * draw(E, D, F)
    offset = torch.tensor(counts).cumsum(0).int()
    inputs = [t.to(dtype).requires_grad_() for t in (rows, gate_up, down)]
    return inputs, offset, draw(sum(counts), D).to(dtype)


def close(got, expected, dtype):
    scale = expected.abs().max().clamp(min=1e-3)
    return ((got - expected).abs().max() / scale).item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
def test_outputs_and_gradients_are_those_of_the_reference(counts, dtype, monkeypatch):
    inputs, offset, grad = make(counts, dtype)
    truth = [t.detach().double().requires_grad_() for t in inputs]
    expected = phi_kernels.reference_expert_mlp(truth[0], offset, *truth[1:])
    expected_grads = torch.autograd.grad(expected, truth, grad.double())
    real_empty_like = torch.empty_like
    # memory that is never written shows as NaN
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **kw: real_empty_like(t, **kw).fill_(float("nan"))
    )
    got = phi_kernels.cpu_expert_mlp(inputs[0], offset, *inputs[1:])
    assert got.shape == inputs[0].shape
    assert close(got.double(), expected, dtype)
    for one, other in zip(torch.autograd.grad(got, inputs, grad), expected_grads, strict=True):
        assert one.dtype == dtype
        assert close(one.double(), other, dtype)


@pytest.mark.parametrize("counts", [(3, 8, 0, 65, 17), (600, 3, 0, 200, 90)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_inference_is_as_near_as_training(counts, dtype):
    inputs, offset, _ = make(counts, dtype)  # few rows take torch's one call, many our own path
    truth = [t.detach().double() for t in inputs]
    expected = phi_kernels.reference_expert_mlp(truth[0], offset, *truth[1:])
    with torch.inference_mode():
        plain = phi_kernels.cpu_expert_mlp(inputs[0], offset, *inputs[1:])
    assert close(plain.double(), expected, dtype)


def test_an_experts_rows_do_not_depend_on_its_neighbours():
    (rows, gate_up, down), offset, _ = make((3, 8, 9, 16, 17), torch.bfloat16)
    with torch.no_grad():
        changed = rows.clone()
        changed[20:] = 1e30  # experts 3 and 4, which slices of 0 to 2 reach into
    before, after = (
        phi_kernels.cpu_expert_mlp(x.requires_grad_(), offset, gate_up, down)
        for x in (rows, changed)
    )
    assert torch.equal(before[:20], after[:20])


def test_no_rows_at_all_give_no_rows_and_zero_gradients():
    inputs, offset, grad = make((0, 0, 0, 0, 0), torch.float32)
    got = phi_kernels.cpu_expert_mlp(inputs[0], offset, *inputs[1:])
    grads = torch.autograd.grad(got, inputs, grad)
    assert got.shape == (0, D)
    assert [t.abs().sum().item() for t in grads] == [0, 0, 0]


def test_rows_elsewhere_are_refused():
    rows = torch.empty(2, D, device="meta")
    weights = torch.empty(E, 2 * F, D, device="meta"), torch.empty(E, D, F, device="meta")
    with pytest.raises(ValueError, match="got rows on meta"):
        phi_kernels.cpu_expert_mlp(rows, torch.zeros(E).int(), *weights)
