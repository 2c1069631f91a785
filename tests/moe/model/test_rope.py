"""LongRoPE tables against the formula with Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from moe.model.rope import rotary_tables, rotate
from moe.model_config import RopeConfig

LONG = RopeConfig(
    theta=100.0, original_max_position=6, short_factor=(1.0, 1.5, 2.0), long_factor=(3.0, 4.0, 5.0),
    short_mscale=1.25, long_mscale=1.5,
)  # fmt: skip


@pytest.mark.parametrize("length", [5, 6, 7])
def test_tables_follow_the_formula_and_switch_strictly_beyond_the_original_length(length):
    cos, sin = rotary_tables(torch.arange(length)[None], LONG, rotary_dim=6)
    factor = LONG.long_factor if length > 6 else LONG.short_factor
    mscale = LONG.long_mscale if length > 6 else LONG.short_mscale
    for place in range(length):
        for i in range(6):
            angle = place / (factor[i % 3] * 100.0 ** (2 * (i % 3) / 6))
            assert cos[0, place, i].item() == pytest.approx(mscale * math.cos(angle), abs=1e-5)
            assert sin[0, place, i].item() == pytest.approx(mscale * math.sin(angle), abs=1e-5)


def test_the_product_of_rotated_vectors_depends_on_distance_only():
    config = RopeConfig()
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    products = []
    for shift in (0, 5, 100):
        tables = [rotary_tables(torch.tensor([[p + shift]]), config, rotary_dim=8) for p in (9, 2)]
        turned = [rotate(x, *t) for x, t in zip((query, key), tables, strict=True)]
        products.append((turned[0] * turned[1]).sum().item())
    # float32 angles up to 109: relative rounding 2^-24 of an angle is 7e-6
    assert products[1:] == pytest.approx([products[0]] * 2, abs=1e-4)
