"""Causal attention against the reference in float64: the CPU's bfloat16 path, and torch's own."""

from __future__ import annotations

import phi_kernels
import pytest
import torch
from torch.nn import functional

# batch, heads, kv heads, length, width; the comment names the edge
SHAPES = [
    (1, 1, 1, 1, 8),  # one token
    (2, 4, 2, 191, 16),  # the longest that is left to torch
    (2, 4, 2, 192, 16),  # the shortest that is not; half a second chunk, grouped heads
    (1, 4, 4, 256, 64),  # exactly two chunks
    (2, 6, 1, 257, 8),  # one query in the last chunk, all heads on one key head
    (1, 3, 3, 300, 96),  # three chunks; 1 / sqrt(96) is no power of two
    (1, 16, 4, 1100, 8),  # scores of one chunk do not fit: several groups of heads
]


def draw(shape, dtype, spread=1.5):
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator().manual_seed(length)
    sizes = ((batch, heads, length, width), *2 * [(batch, kv_heads, length, width)])
    return [(spread * torch.randn(size, generator=generator)).to(dtype) for size in sizes]


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_as_near_to_float64_as_torchs_own(shape):
    inputs = draw(shape, torch.bfloat16)
    scale = shape[-1] ** -0.5
    truth = phi_kernels.reference_causal_attention(*[t.double() for t in inputs], scale=scale)
    with torch.no_grad():
        got = phi_kernels.causal_attention(*inputs, scale=scale)
        own = functional.scaled_dot_product_attention(
            *inputs, is_causal=True, scale=scale, enable_gqa=True
        )
    error, own_error = ((t - truth).square().mean().sqrt() for t in (got, own))
    # weights and output are rounded to 8 bits, the scores are not: 2^-9 is half a unit of the last
    assert error <= 2**-8 * truth.square().mean().sqrt()
    assert error <= 2 * own_error + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_equal_the_reference(shape, dtype):
    inputs = draw(shape, dtype)
    scale = shape[-1] ** -0.5
    got = phi_kernels.causal_attention(*inputs, scale=scale)
    expected = phi_kernels.reference_causal_attention(*[t.double() for t in inputs], scale=scale)
    assert torch.allclose(got.double(), expected, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_gradients_in_bfloat16_take_torchs_own_path():
    inputs = [t.requires_grad_() for t in draw((1, 4, 2, 200, 16), torch.bfloat16)]
    phi_kernels.causal_attention(*inputs, scale=0.25).sum().backward()
    assert all(t.grad is not None for t in inputs)


def test_the_setting_for_products_is_as_it_was():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with torch.no_grad():
        phi_kernels.causal_attention(*draw((1, 2, 2, 240, 16), torch.bfloat16), scale=0.25)
    assert setting.fp32_precision == before


def test_later_places_are_never_seen():
    query, key, value = draw((1, 4, 2, 260, 16), torch.bfloat16)
    with torch.no_grad():
        before = phi_kernels.causal_attention(query, key, value, scale=0.25)
        key[:, :, 200:], value[:, :, 200:] = 30.0, 1e4
        after = phi_kernels.causal_attention(query, key, value, scale=0.25)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])
