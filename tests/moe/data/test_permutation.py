"""moe/data/permutation.py: one to one, different for each key, and the same for all time."""

from __future__ import annotations

import numpy as np
import pytest

from moe.data.permutation import permuted, random_key, shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_both_orders_are_permutations(size: int) -> None:
    everything = list(range(size))
    assert sorted(shuffled(size, key=5).tolist()) == everything
    assert sorted(permuted(np.arange(size), size=size, key=5).tolist()) == everything


def test_a_part_of_the_order_is_found_alone() -> None:
    whole = permuted(np.arange(1000), size=1000, key=9)
    part = permuted(np.array([999, 0, 17]), size=1000, key=9)
    assert part.tolist() == whole[[999, 0, 17]].tolist()


def test_huge_sizes_stay_in_range() -> None:
    size = 10**12 + 7
    found = permuted(np.arange(size - 1000, size), size=size, key=3)
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0
    assert found.max() < size


def test_another_epoch_is_another_order() -> None:
    keys = [random_key(0, "windows", 0), random_key(0, "windows", 1), random_key(1, "windows", 0)]
    orders = {tuple(permuted(np.arange(100), size=100, key=key).tolist()) for key in keys}
    assert len(orders) == 3
    assert len({tuple(shuffled(100, key=key).tolist()) for key in keys}) == 3


def test_neighbours_are_scattered() -> None:
    order = permuted(np.arange(10_000), size=10_000, key=random_key(0))
    gaps = np.abs(np.diff(order))
    # two independent uniform numbers are a third of the range apart on average
    assert abs(gaps.mean() / 10_000 - 1 / 3) < 0.02
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_the_orders_never_change_between_versions() -> None:
    # a prepared run must resume on the same data with a later numpy
    assert permuted(np.arange(8), size=8, key=1).tolist() == [4, 0, 3, 2, 5, 1, 7, 6]
    assert shuffled(8, key=1).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    assert random_key(0, "windows", 3) == 18581218639454263424718756126952521047
