"""Which configurations a GPU gets; that they compile and fit is in test_compiled_kernels.py."""

from __future__ import annotations

import pytest
import torch
from phi_kernels.tuning import FEW_ROWS, choose_tiles, shipped_tiles

CONSUMER_SHARED = 99 * 1024  # bytes of a block on 8.6, 8.9 and 12.0


@pytest.mark.parametrize("capability", [80, 86, 89, 120])
def test_parts_without_a_data_centres_shared_memory_get_small_tiles(capability):
    for tiles in shipped_tiles(capability, torch.bfloat16):
        for tile in tiles:
            operands = (tile.rows + tile.columns) * tile.reduction * 2
            assert operands * (tile.num_stages - 1) <= CONSUMER_SHARED


@pytest.mark.parametrize("capability", [90, 100, 103])
def test_data_centre_parts_get_large_tiles(capability):
    many, few = shipped_tiles(capability, torch.float16)
    assert (many.down.rows, many.down.columns, few.down.rows) == (128, 256, 64)


@pytest.mark.parametrize("capability", [90, 100])
def test_weight_gradients_are_read_as_many_steps_ahead_as_the_other_products(capability):
    """Two levels of loads share their stages: n of them read (n - 1) // 2 steps ahead."""
    for tiles in shipped_tiles(capability, torch.bfloat16):
        assert (tiles.weight_gradient.num_stages - 1) // 2 == tiles.down.num_stages - 1


def test_older_parts_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"got 7\.5; .* needs 8\.0 .* experts=grouped_mm"):
        shipped_tiles(75, torch.bfloat16)


def test_few_rows_an_expert_get_tiles_of_64():
    for num_rows, rows in ((FEW_ROWS * 16 - 1, 64), (FEW_ROWS * 16, 128)):
        assert choose_tiles(torch.bfloat16, num_rows=num_rows, num_experts=16).down.rows == rows


def test_the_products_over_rows_share_one_tile_table():
    for capability in (80, 90, 100, 120):
        for dtype in (torch.bfloat16, torch.float32):
            for tiles in shipped_tiles(capability, dtype):
                assert len({tile.rows for tile in tiles[:4]}) == 1
