"""A range of a tensor of the whole model, as one process holds it.

Layouts differ in which ranges of which tensors a process has: all of it, some experts, a part of a
flat partition that begins in the middle of a row. A checkpoint is made of these, so that any layout
writes it and any other reads it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Piece(NamedTuple):
    """values.numel() elements of the flattened whole tensor, from element `start` on."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    values: Tensor  # of any shape and on any device; a view of what the process holds
