"""Ranges that several ranks hold are written once, and every element by somebody."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe.parallel.pieces import (
    HeldRange,
    Piece,
    fill,
    model_pieces,
    optimizer_pieces,
    without_empty,
)

SHAPE = (4, 5)
WHOLE = torch.arange(20.0)


def held(start: int, end: int, *, replica: int = 0, num_replicas: int = 1) -> HeldRange:
    values = WHOLE[start:end].clone()
    moments = {"exp_avg": values + 100, "exp_avg_sq": values + 200}
    step = torch.tensor(7.0)
    return HeldRange("a", SHAPE, start, values, moments, step, replica, num_replicas)


def tiled(pieces: list[Piece], name: str, size: int) -> Tensor:
    """The whole tensor; every element exactly once."""
    whole = torch.full((size,), torch.nan)
    for piece in without_empty(pieces):
        if piece.name == name:
            there = whole[piece.start : piece.start + piece.values.numel()]
            assert there.isnan().all()
            there.copy_(piece.values.flatten())
    assert not whole.isnan().any()
    return whole


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("cuts", [(0, 20), (0, 7, 20), (0, 1, 2, 20)])
def test_replicas_share_what_they_hold(cuts: tuple[int, ...], num_replicas: int) -> None:
    ranges = [
        held(start, end, replica=replica, num_replicas=num_replicas)
        for start, end in itertools.pairwise(cuts)
        for replica in range(num_replicas)
    ]
    assert torch.equal(tiled(model_pieces(ranges), "a", 20), WHOLE)
    moments = optimizer_pieces(ranges)
    assert torch.equal(tiled(moments, "a.exp_avg", 20), WHOLE + 100)
    assert torch.equal(tiled(moments, "a.exp_avg_sq", 20), WHOLE + 200)
    assert tiled(moments, "a.step", 1).item() == 7  # once, though every range has it


def test_replicas_write_about_equally_much() -> None:
    shares = [model_pieces([held(0, 20, replica=r, num_replicas=3)])[0] for r in range(3)]
    assert [share.values.numel() for share in shares] == [6, 7, 7]


def test_filling_writes_through_the_views_that_the_optimiser_goes_on_with() -> None:
    target = held(5, 12)
    target.values.zero_()

    def read(stem: str, name: str, start: int, into: Tensor) -> None:
        if name == "a.step":
            into.fill_(9)
        else:
            into.copy_(WHOLE[start : start + into.numel()] + (0 if stem == "model" else 1000))

    fill([target], read, with_moments=False)
    assert torch.equal(target.values, WHOLE[5:12])
    assert target.moments["exp_avg"][0] == 105  # untouched
    fill([target], read, with_moments=True)
    assert torch.equal(target.moments["exp_avg_sq"], WHOLE[5:12] + 1000)
    assert target.step is not None
    assert target.step.item() == 9
