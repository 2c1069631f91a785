"""Ranges of the whole model's tensors, as one process holds them.

Layouts differ in which ranges of which tensors a process has: all of it, some experts, a part of a
flat partition that begins in the middle of a row. A checkpoint is made of such ranges, so that any
layout writes it and any other reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"


class Piece(NamedTuple):
    """values.numel() elements of the flattened whole tensor, from element `start` on."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    values: Tensor  # of any shape and on any device; a view of what the process holds


class HeldRange(NamedTuple):
    """A range of a parameter for which this process updates values and moments.

    values and moments are flat views: writing into them changes what the optimiser goes on with.
    """

    name: str
    shape: tuple[int, ...]  # of the whole parameter, all experts included
    start: int
    values: Tensor  # float32 where the parameter itself is a rounded copy
    moments: dict[str, Tensor]  # by ADAM_MOMENTS; empty before the first update
    step: Tensor | None  # updates so far, a scalar; None before the first
    replica: int = 0  # which of num_replicas processes that hold exactly this range
    num_replicas: int = 1


class ReadRange(Protocol):
    """Fills `into`, flat, with the elements from `start` on of a saved whole tensor."""

    def __call__(self, stem: str, name: str, start: int, into: Tensor) -> None: ...


def model_pieces(held: Iterable[HeldRange]) -> list[Piece]:
    """This process's part of the parameters: replicas of a range share the work."""
    return [_share(one, one.name, one.values) for one in held]


def optimizer_pieces(held: Iterable[HeldRange]) -> list[Piece]:
    """The same for moments, as <parameter>.exp_avg and so on, and <parameter>.step."""
    pieces = []
    for one in held:
        for key, values in one.moments.items():
            pieces.append(_share(one, f"{one.name}.{key}", values))
        if one.step is not None and one.start == 0 and one.replica == 0 and len(one.values):
            pieces.append(Piece(f"{one.name}.{_STEP}", (), 0, one.step))
    return pieces


def _share(one: HeldRange, name: str, values: Tensor) -> Piece:
    """The part that this replica writes: contiguous, and about equally long for each."""
    first, end = (
        len(values) * place // one.num_replicas for place in (one.replica, one.replica + 1)
    )
    return Piece(name, one.shape, one.start + first, values[first:end])


@torch.no_grad()
def fill(held: Iterable[HeldRange], read: ReadRange, *, with_moments: bool) -> None:
    """Read every range; the reverse of model_pieces and optimizer_pieces, in any layout."""
    for one in held:
        read("model", one.name, one.start, one.values)
        if with_moments:
            for key, values in one.moments.items():
                read("optimizer", f"{one.name}.{key}", one.start, values)
            assert one.step is not None
            step = torch.empty(1)
            read("optimizer", f"{one.name}.{_STEP}", 0, step)
            one.step.copy_(step[0])


def without_empty(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Those that hold something: a small tensor has no part for some processes."""
    return (piece for piece in pieces if piece.values.numel())
