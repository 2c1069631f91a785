"""Which tile sizes each grouped product runs with, and why.

The choice depends on the GPU, the element size and the mean number of rows of an expert, all known
on the host before anything runs. Nothing is timed at run time, so the same call does the same
arithmetic in every process and after every restart. `kernels/bench/moe_layer.py --tune` times the
alternatives on a GPU; kernels/README.md says what was measured and what is still a guess.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from phi_kernels.triton_device import compute_capability


class Tile(NamedTuple):
    """One configuration of a grouped product: a tile of its output and how it is reduced."""

    rows: int
    columns: int  # of gate_up: those of the gate and of the up product together
    reduction: int
    num_warps: int
    num_stages: int  # of the software pipeline: how many reduction steps are in flight
    group: int  # row tiles that share a column tile before the next one: what stays in L2
    programs: int = 1  # of a multiprocessor: with two, one's epilogue hides behind the other


class Tiles(NamedTuple):
    """The configurations of one layer; the first four share the rows of one tile table."""

    gate_up: Tile
    down: Tile
    swiglu_backward: Tile
    input_gradient: Tile
    weight_gradient: Tile


# Below this mean number of rows an expert a tile has 64 rows: half a tile an expert is lost on
# average, of 128 rows that would be a sixth or more of all the work.
FEW_ROWS = 384

# 128 x 256 on eight warps: 128 accumulators a thread, the largest that leaves registers for an
# epilogue, and the least read from L2 for each product (48 KiB for 128 x 256 x 64). Four stages
# fill 192 of the 227 KiB. 16 row tiles of one expert (2,048 rows at 16,384 tokens) share a column
# tile: with the weight tiles of one wave they are 33 MB, within L2's 50. In the weight gradient a
# row's place is read before the row; two levels of loads share the stages, so that n of them read
# (n - 1) // 2 steps ahead: 7 for the 3 that 4 give elsewhere (four buffers of each side).
_LARGE = Tile(128, 256, 64, 8, 4, 16)
_LARGE_90 = Tiles(_LARGE, _LARGE, _LARGE, _LARGE, _LARGE._replace(num_stages=7))
# half the rows: the same columns, so that a weight tile is still read in wide pieces
_FEW = Tile(64, 256, 64, 8, 4, 16)
_FEW_90 = Tiles(_FEW, _FEW, _FEW, _FEW, _LARGE._replace(num_stages=7))
# mma.sync keeps operands in registers as well: a smaller tile; 163 KiB of shared memory
_LARGE_80 = Tiles(
    Tile(128, 128, 64, 8, 3, 8),
    Tile(128, 128, 32, 8, 3, 8),
    Tile(128, 128, 64, 8, 3, 8),
    Tile(128, 128, 32, 8, 3, 8),
    Tile(128, 128, 64, 8, 4, 8),
)
_FEW_80 = Tiles._make([*(tile._replace(rows=64) for tile in _LARGE_80[:4]), _LARGE_80[4]])
# float32 is for checking: exact products on the ordinary units, no tensor cores. Both operands
# pass through registers, so short reductions, and a small tile where the epilogue is long
_EXACT = Tile(64, 64, 16, 8, 3, 8)
_FLOAT32 = Tiles(
    _EXACT._replace(columns=32), _EXACT, _EXACT._replace(columns=32), _EXACT,
    Tile(64, 64, 32, 4, 3, 8),
)  # fmt: skip

# compute capability (the next lower one counts) -> 16-bit tiles for many and for few rows; 120, the
# workstation Blackwell, has 99 KiB of shared memory and mma.sync like an A100, not what 100 has
_SHIPPED = {
    120: (_LARGE_80, _FEW_80),
    100: (_LARGE_90, _FEW_90),
    90: (_LARGE_90, _FEW_90),
    80: (_LARGE_80, _FEW_80),
}


def shipped_tiles(capability: int, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Return the configurations for many and for few rows an expert."""
    if dtype == torch.float32:
        return _FLOAT32, _FLOAT32
    known = [number for number in _SHIPPED if number <= capability]
    if not known:
        raise ValueError(
            f"compute capability: got {capability / 10}; the triton back-end needs 8.0 (A100) or "
            "newer. Use experts=grouped_mm or experts=reference."
        )
    return _SHIPPED[max(known)]


def choose_tiles(dtype: torch.dtype, *, num_rows: int, num_experts: int) -> Tiles:
    """Return the configurations for this GPU, the type and the mean number of rows an expert."""
    many, few = shipped_tiles(compute_capability(), dtype)
    return few if num_rows < FEW_ROWS * num_experts else many
