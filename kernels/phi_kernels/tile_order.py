"""Which tile of a grouped product a persistent program computes next, and halves of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_at(index, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """Return (row tile, column tile): GROUP row tiles take a column tile before the next one does.

    Programs that run at the same time then read the same few weight tiles and the same few panels
    of rows, which stay in L2.
    """
    size = GROUP * num_column_tiles
    first = (index // size) * GROUP
    num_rows = tl.minimum(num_row_tiles - first, GROUP)
    return first + (index % size) % num_rows, (index % size) // num_rows


@triton.jit
def left_and_right(tile):
    """Return the two halves (rows, columns / 2) of a tile's columns.

    Both stay in the registers they are in: the accumulators of tensor cores hold a row's columns
    within a few threads, so nothing is exchanged. An epilogue by halves needs fewer registers.
    """
    HALF: tl.constexpr = tile.shape[1] // 2
    return tile.reshape(tile.shape[0], 2, HALF).permute(0, 2, 1).split()
