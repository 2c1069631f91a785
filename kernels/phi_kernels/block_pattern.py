"""Which keys a query sees in phi-3-small's block-sparse attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockPattern(NamedTuple):
    """The rule, for blocks of block_size consecutive places counted from 0.

    A query in block i sees a key at the same place or before it, in block j, where
    i - j < num_local_blocks, or where j + phase + 1 is a multiple of vertical_stride. The phase of
    head h of H, counted over the whole model, is h * max(1, vertical_stride // H), or 0 where all
    heads are the same. Source: the released modeling_phi3_small.py and its block-sparse kernels.
    """

    block_size: int
    num_local_blocks: int
    vertical_stride: int
    is_same_for_all_heads: bool

    def heads_by_phase(self, num_heads: int) -> dict[int, list[int]]:
        """Phase, below vertical_stride -> the heads that have it."""
        step = 0 if self.is_same_for_all_heads else max(1, self.vertical_stride // num_heads)
        groups: dict[int, list[int]] = {}
        for head in range(num_heads):
            groups.setdefault(head * step % self.vertical_stride, []).append(head)
        return groups

    def sees(self, query_place: Tensor, key_place: Tensor, *, phase: int) -> Tensor:
        """Return bool, True where the query at query_place sees the key at key_place."""
        query_block, key_block = query_place // self.block_size, key_place // self.block_size
        is_local = query_block - key_block < self.num_local_blocks
        is_column = (key_block + phase + 1) % self.vertical_stride == 0
        return (key_place <= query_place) & (is_local | is_column)
