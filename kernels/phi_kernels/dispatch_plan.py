"""The index arrays of one routing: which slot each row copies, and where each slot's row is.

A slot is one choice of one token, slot = token * K + k. Rows are the slots sorted by expert, tokens
in order; N = T * K. The two maps are inverse permutations of each other.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DispatchPlan(NamedTuple):
    """Integers on the routing's device, made without a host synchronisation."""

    slot_of_row_N: Tensor  # int64
    row_of_slot_TK: Tensor  # int64
    offset_E: Tensor  # int32, end of each expert's rows: e owns offset_E[e-1] to offset_E[e]

    @property
    def top_k(self) -> int:
        return self.row_of_slot_TK.shape[1]

    def token_of_row_N(self) -> Tensor:
        """int64 (N,): the token that each row copies."""
        return self.slot_of_row_N // self.top_k


class TileTable(NamedTuple):
    """The rows of a plan in tiles that hold rows of one expert only, in the order of rows.

    M = ceil(N / tile_rows) + E, more than there can be; entries from num_tiles on are 0, 0. A tile
    ends after tile_rows rows or with its expert's rows.
    """

    expert_of_tile_M: Tensor  # int32
    first_row_of_tile_M: Tensor  # int32
    num_tiles_1: Tensor  # int32


class Needs(NamedTuple):
    """Which of the four gradients of the experts somebody asks for."""

    x: bool
    weight: bool
    gate_up: bool
    down: bool
