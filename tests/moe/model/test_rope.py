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


def test_a_row_has_the_tables_that_it_has_alone_also_beside_a_row_of_the_other_regime():
    position = torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6], [0, 5, 0, 1], [6, 0, 1, 2]])
    together = rotary_tables(position, LONG, rotary_dim=6)
    for row in range(4):
        alone = rotary_tables(position[row : row + 1], LONG, rotary_dim=6)
        for got, expected in zip(together, alone, strict=True):
            assert torch.equal(got[row], expected[0])
    # rows 1 and 3 reach place 6, the seventh: place 0 of row 3 too has the long mscale
    assert together[0][:, :, 0][position == 0].tolist() == [1.25, 1.25, 1.25, 1.5]


def test_a_document_has_the_tables_that_it_has_alone_beside_one_of_the_other_regime():
    lengths, numbers = [[3, 7, 2], [8, 4, 0], [6, 1, 5]], [5, 900, -1]
    document = torch.tensor(
        [[d for d, n in zip(numbers, row, strict=True) for _ in range(n)] for row in lengths]
    )
    position = torch.tensor([[i for n in row for i in range(n)] for row in lengths])
    together = rotary_tables(position, LONG, rotary_dim=6, document_BS=document)
    for row, row_lengths in enumerate(lengths):
        parts = [table[row].split(row_lengths) for table in together]
        for part, length in enumerate(row_lengths):
            alone = rotary_tables(torch.arange(length)[None], LONG, rotary_dim=6) if length else ()
            for got, expected in zip(parts, alone, strict=False):
                assert torch.equal(got[part], expected[0])


def test_a_row_is_long_in_all_its_places_or_in_none():
    for last, mscale in ((5, 1.25), (6, 1.5)):
        cos, sin = rotary_tables(torch.tensor([[0, 2, last, 1]]), LONG, rotary_dim=6)
        length = (cos.square() + sin.square()).sqrt()
        assert torch.allclose(length, torch.full_like(length, mscale))


def test_without_factors_a_row_beyond_the_original_length_keeps_its_frequencies():
    config = RopeConfig(original_max_position=6)
    short, _ = rotary_tables(torch.arange(6)[None], config, rotary_dim=6)
    beyond, _ = rotary_tables(torch.arange(9)[None], config, rotary_dim=6)
    assert torch.equal(beyond[:, :6], short)


def test_a_part_of_the_head_rotates_and_the_rest_passes():
    x = torch.randn(2, 3, 5, 10, generator=torch.Generator().manual_seed(0))
    position = torch.arange(5).expand(2, 5)
    tables = rotary_tables(position, RopeConfig(rotary_fraction=0.6), rotary_dim=6)
    got = rotate(x, *tables)
    assert torch.equal(got[..., 6:], x[..., 6:])
    assert torch.equal(got[..., :6], rotate(x[..., :6], *tables))
    # pairs are (0, 3), (1, 4), (2, 5): halves, not neighbours
    for i in range(3):
        frequency = 10_000.0 ** (-2 * i / 6)
        turned = torch.complex(x[..., i], x[..., i + 3]) * torch.polar(
            torch.ones(5), position[0] * frequency
        )
        assert torch.allclose(got[..., i], turned.real, atol=1e-5)
        assert torch.allclose(got[..., i + 3], turned.imag, atol=1e-5)


def test_bfloat16_is_rotated_in_float32_and_rounded_once():
    x = torch.randn(1, 1, 50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = rotary_tables(torch.arange(50)[None], RopeConfig(), rotary_dim=8)
    got = rotate(x, *tables)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate(x.float(), *tables).bfloat16())
