"""moe/data/selection.py: whole groups, stable sides, every domain on both sides, fair cuts."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from moe.data.selection import (
    Block,
    Blocks,
    cut_to_bytes,
    draw,
    first_of_each,
    held_out,
    with_every_domain,
)


def blocks_of(
    draw_D: np.ndarray | list[float],
    *,
    domain_D: np.ndarray,
    size_D: np.ndarray | None = None,
    groups: list[str] | None = None,
    member_D: np.ndarray | None = None,
    cut: int = 7,
) -> Blocks:
    """The documents in blocks of at most cut."""
    number = len(draw_D)
    size_D = np.ones(number, dtype=np.int64) if size_D is None else size_D
    member_D = np.ones(number, dtype=bool) if member_D is None else member_D
    names = groups or [str(n) for n in range(number)]
    group_D = np.array(
        [int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big") for n in names],
        dtype=np.uint64,
    )
    columns = (member_D, np.asarray(draw_D), np.asarray(domain_D, dtype=np.int64), size_D, group_D)
    starts = range(0, number, cut)
    return lambda: [Block(*(column[s : s + cut] for column in columns)) for s in starts]


def sides(
    groups: list[str], *, domain_D: np.ndarray, fraction: float, seed: int, cut: int = 7
) -> np.ndarray:
    draws = [draw(group, seed=seed, purpose="validation") for group in groups]
    blocks = blocks_of(draws, domain_D=domain_D, groups=groups, cut=cut)
    return held_out(blocks, num_domains=int(domain_D.max()) + 1, fraction=fraction)


def test_a_group_is_never_torn_apart() -> None:
    groups = [f"group{number // 3}" for number in range(600)]
    side = sides(groups, domain_D=np.arange(600) % 3, fraction=0.3, seed=0)
    for first in range(0, 600, 3):
        assert len(set(side[first : first + 3].tolist())) == 1
    assert 0.2 < side.mean() < 0.4


def test_adding_documents_does_not_move_the_others() -> None:
    old = [f"file{number}" for number in range(300)]
    new = sorted(old + [f"added{number}" for number in range(100)])
    side = sides(old, domain_D=np.zeros(300), fraction=0.2, seed=4)
    before = dict(zip(old, side.tolist(), strict=True))
    side = sides(new, domain_D=np.zeros(400), fraction=0.2, seed=4)
    after = dict(zip(new, side.tolist(), strict=True))
    assert all(after[name] == side for name, side in before.items())


def test_another_seed_is_another_split() -> None:
    groups = [str(number) for number in range(300)]
    found = [sides(groups, domain_D=np.zeros(300), fraction=0.2, seed=s) for s in (0, 1)]
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("cut", [1, 2, 100])
@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_every_domain_of_two_groups_is_on_both_sides(fraction: float, cut: int) -> None:
    groups = ["a", "b", "c", "d", "e", "f", "g"]
    domain = np.array([0, 0, 1, 1, 1, 2, 2])
    side = sides(groups, domain_D=domain, fraction=fraction, seed=1, cut=cut)
    for number in range(3):
        assert set(side[domain == number].tolist()) == {True, False}


@pytest.mark.parametrize("groups", [["only"], ["same", "same"], ["a", "b"]])
def test_what_cannot_be_split_is_on_one_side(groups: list[str]) -> None:
    domain = np.arange(len(groups)) if groups == ["a", "b"] else np.zeros(len(groups))
    assert not sides(groups, domain_D=domain, fraction=1e-9, seed=0).any()
    assert sides(groups, domain_D=domain, fraction=1 - 1e-9, seed=0).all()


@pytest.mark.parametrize("at_once", [100, 1000, 10_000])
def test_each_domain_is_cut_to_its_share(at_once: int) -> None:
    generator = np.random.default_rng(0)
    size = generator.integers(10, 100, 3000)
    domain = np.repeat([0, 1, 1], 1000)
    draws = [draw(str(number), seed=0, purpose="test") for number in range(3000)]
    blocks = blocks_of(draws, domain_D=domain, size_D=size, cut=700)
    kept = cut_to_bytes(blocks, num_domains=2, max_bytes=30_000, at_once=at_once)
    assert 29_000 < size[kept].sum() <= 30_000
    for number in (0, 1):
        share = size[domain == number].sum() / size.sum()
        assert size[kept & (domain == number)].sum() == pytest.approx(share * 30_000, abs=100)
    # one after another in the order of the draws, whatever does not fit passed over
    for number in (0, 1):
        left = int(size[domain == number].sum()) * 30_000 // int(size.sum())
        for document in sorted(np.flatnonzero(domain == number), key=lambda d: draws[d]):
            assert kept[document] == (size[document] <= left)
            left -= int(size[document]) * int(kept[document])


def test_no_limit_keeps_everything_and_a_tiny_one_nothing() -> None:
    size, zeros = np.array([50, 60]), np.zeros(2)
    blocks = blocks_of([0.1, 0.2], domain_D=zeros, size_D=size)
    for max_bytes, count in ((0, 2), (110, 2), (49, 0)):
        assert cut_to_bytes(blocks, num_domains=1, max_bytes=max_bytes).sum() == count


def test_a_document_that_does_not_fit_is_passed_over() -> None:
    size = np.array([1000, 30, 30])
    blocks = blocks_of([0.1, 0.2, 0.3], domain_D=np.zeros(3), size_D=size)
    assert cut_to_bytes(blocks, num_domains=1, max_bytes=70).tolist() == [False, True, True]


def test_only_members_are_counted_and_kept() -> None:
    size = np.array([10, 10, 10, 10])
    member = np.array([True, False, True, True])
    blocks = blocks_of([0.4, 0.1, 0.2, 0.3], domain_D=np.zeros(4), size_D=size, member_D=member)
    kept = cut_to_bytes(blocks, num_domains=1, max_bytes=20)
    assert kept.tolist() == [False, False, True, True]
    assert not held_out(blocks, num_domains=1, fraction=0.5)[1]


@pytest.mark.parametrize("at_once", [1, 50, 10_000])
def test_the_first_of_equal_texts_stays(at_once: int) -> None:
    generator = np.random.default_rng(1)
    texts = generator.integers(0, 120, 400)
    digests = [hashlib.sha256(str(text).encode()).digest() for text in texts]
    high, low = (
        np.array([int.from_bytes(d[s : s + 8], "big") for d in digests], dtype=np.uint64)
        for s in (0, 8)
    )
    high[7], low[7] = high[3], low[3] + 1  # half equal is not equal
    first = first_of_each(
        lambda: [(high[s : s + 33], low[s : s + 33]) for s in range(0, 400, 33)], at_once=at_once
    )
    seen: set[tuple[int, int]] = set()
    for place, pair in enumerate(zip(high.tolist(), low.tolist(), strict=True)):
        assert first[place] == (pair not in seen)
        seen.add(pair)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_domain_without_a_kept_document_gives_its_first_smallest_member(cut: int) -> None:
    domain_D = np.array([0, 1, 1, 1, 0, 2, 3, 1])
    size_D = np.array([9, 50, 40, 40, 9, 8, 7, 1])
    member_D = np.array([True] * 5 + [True, False, False])
    blocks = blocks_of([0.5] * 8, domain_D=domain_D, size_D=size_D, member_D=member_D, cut=cut)
    kept_D = np.array([True] + [False] * 7)
    found = with_every_domain(kept_D, blocks, num_domains=5)
    # domain 0 has one, 1 gives its first of 40 bytes, 2 its only one, 3 has no member, 4 nothing
    assert found.tolist() == [True, False, True, False, False, True, False, False]
    assert kept_D.sum() == 1
