"""moe/data/selection.py: whole groups, stable sides, every domain on both sides, fair cuts."""

from __future__ import annotations

import numpy as np
import pytest

from moe.data.selection import cut_to_bytes, group_draws, held_out
from moe.errors import DataError


def test_a_group_is_never_torn_apart() -> None:
    groups = [f"group{number // 3}" for number in range(600)]
    side = held_out(groups, domain_D=np.arange(600) % 3, fraction=0.3, seed=0)
    for first in range(0, 600, 3):
        assert len(set(side[first : first + 3].tolist())) == 1
    assert 0.2 < side.mean() < 0.4


def test_adding_documents_does_not_move_the_others() -> None:
    old = [f"file{number}" for number in range(300)]
    new = sorted(old + [f"added{number}" for number in range(100)])
    side = held_out(old, domain_D=np.zeros(300), fraction=0.2, seed=4)
    before = dict(zip(old, side.tolist(), strict=True))
    side = held_out(new, domain_D=np.zeros(400), fraction=0.2, seed=4)
    after = dict(zip(new, side.tolist(), strict=True))
    assert all(after[name] == side for name, side in before.items())


def test_another_seed_is_another_split() -> None:
    groups = [str(number) for number in range(300)]
    sides = [held_out(groups, domain_D=np.zeros(300), fraction=0.2, seed=s) for s in (0, 1)]
    assert (sides[0] != sides[1]).any()


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_every_domain_of_two_groups_is_on_both_sides(fraction: float) -> None:
    groups = ["a", "b", "c", "d", "e", "f", "g"]
    domain = np.array([0, 0, 1, 1, 1, 2, 2])
    side = held_out(groups, domain_D=domain, fraction=fraction, seed=1)
    for number in range(3):
        assert set(side[domain == number].tolist()) == {True, False}


@pytest.mark.parametrize("groups", [["only"], ["same", "same"], ["a", "b"]])
def test_what_cannot_be_split_is_an_error(groups: list[str]) -> None:
    domain = np.arange(len(groups)) if groups == ["a", "b"] else np.zeros(len(groups))
    with pytest.raises(DataError, match=r"data\.sources: .*cannot be split.*Add documents"):
        held_out(groups, domain_D=domain, fraction=1e-9, seed=0)


def test_each_domain_is_cut_to_its_share() -> None:
    generator = np.random.default_rng(0)
    size = generator.integers(10, 100, 3000)
    domain = np.repeat([0, 1, 1], 1000)
    draw = group_draws([str(number) for number in range(3000)], seed=0, purpose="test")
    kept = cut_to_bytes(draw, domain_D=domain, size_D=size, max_bytes=30_000)
    assert 29_000 < size[kept].sum() <= 30_000
    for number in (0, 1):
        share = size[domain == number].sum() / size.sum()
        assert size[kept & (domain == number)].sum() == pytest.approx(share * 30_000, abs=100)


def test_no_limit_keeps_everything_and_a_tiny_one_nothing() -> None:
    size, zeros = np.array([50, 60]), np.zeros(2)
    draw = np.array([0.1, 0.2])
    assert cut_to_bytes(draw, domain_D=zeros, size_D=size, max_bytes=0).all()
    assert cut_to_bytes(draw, domain_D=zeros, size_D=size, max_bytes=110).all()
    assert not cut_to_bytes(draw, domain_D=zeros, size_D=size, max_bytes=49).any()


def test_a_document_that_does_not_fit_is_passed_over() -> None:
    size = np.array([1000, 30, 30])
    kept = cut_to_bytes(np.array([0.1, 0.2, 0.3]), domain_D=np.zeros(3), size_D=size, max_bytes=70)
    assert kept.tolist() == [False, True, True]
