"""Chunked cross-entropy against torch in float64, values and gradients, with ignored labels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moe.train import cross_entropy as module
from moe.train.cross_entropy import cross_entropy


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # relative to the largest: half a unit in the last place of the gradient's dtype, and rounding
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)],
)
@pytest.mark.parametrize("chunk", [1, 300, 2**21])  # a row at a time, uneven chunks, all at once
def test_values_and_gradients_are_those_of_torch(monkeypatch, dtype, tolerance, chunk):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(37, 50, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(50, (37,), generator=generator)
    labels[::5] = -100
    upstream = torch.rand(37, generator=generator, dtype=torch.float64)
    losses = cross_entropy(logits, labels, ignored=-100)
    (losses * upstream.to(losses.dtype)).sum().backward()

    exact = logits.detach().double().requires_grad_()
    expected = functional.cross_entropy(exact, labels, ignore_index=-100, reduction="none")
    (expected * upstream).sum().backward()
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert losses[::5].abs().max() == 0
    assert (losses - expected).abs().max() <= max(tolerance, 1e-6) * expected.max()
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    assert (logits.grad - exact.grad).abs().max() <= tolerance * exact.grad.abs().max()


def test_very_large_logits_neither_overflow_nor_lose_the_gradient():
    logits = torch.tensor([[1e4, -1e4, 0.0], [3e38, 0.0, 0.0]], requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([1, 0]), ignored=-100)
    losses.sum().backward()
    assert losses.tolist() == [2e4, 0.0]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


def test_all_labels_ignored_gives_zero():
    logits = torch.randn(4, 8, requires_grad=True)
    losses = cross_entropy(logits, torch.full((4,), -100), ignored=-100)
    losses.sum().backward()
    assert losses.tolist() == [0.0] * 4
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0
