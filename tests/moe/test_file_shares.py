"""moe/file_shares.py: every file is read by one, and all have about as much to read."""

from __future__ import annotations

import random

import pytest

from moe.file_shares import share_of_sizes


@pytest.mark.parametrize("num_parts", [1, 2, 7, 64])
def test_every_file_is_in_one_share_and_shares_are_even(num_parts: int) -> None:
    generator = random.Random(0)
    sizes = [generator.randint(0, 1000) for _ in range(300)]
    shares = [share_of_sizes(sizes, part, num_parts=num_parts) for part in range(num_parts)]
    assert sorted(number for share in shares for number in share) == list(range(300))
    loads = [sum(sizes[number] for number in share) for share in shares]
    assert max(loads) - min(loads) <= 1000


def test_fewer_files_than_readers_leave_some_without() -> None:
    assert [share_of_sizes([5, 9], part, num_parts=3) for part in range(3)] == [[1], [0], []]
