"""moe/data/document_table.py: a mapped table is searched and checked without being held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from large_folder import NUM_DOMAINS, make_large_folder

import moe.data.document_table
from moe.data.document_table import check_rows, documents_at, open_table
from moe.data.manifest import load_manifest
from moe.errors import DataError


def lengths(kind: str) -> np.ndarray:
    if kind == "alike":
        return np.full(5000, 9)
    if kind == "one huge":
        return np.where(np.arange(5000) == 1234, 400_000, 2)
    return 2 + (np.random.default_rng(0).pareto(0.8, 5000) * 5).clip(max=50_000).astype(np.int64)


@pytest.mark.parametrize("kind", ["alike", "one huge", "heavy tail"])
@pytest.mark.parametrize("num_shards", [1, 7])
def test_the_document_of_any_token_is_found(tmp_path: Path, kind: str, num_shards: int) -> None:
    length_D = lengths(kind)
    folder = make_large_folder(tmp_path / "data", length_D, num_shards=num_shards)
    entry = load_manifest(folder).split("train")
    documents, places = open_table(folder, entry, dtype="uint16")
    end_D = np.cumsum(length_D)
    token = np.concatenate([end_D - length_D, end_D - 1, np.arange(0, end_D[-1], 997)])
    expected = np.searchsorted(end_D, token, side="right")
    assert (documents_at(documents, token, places=places) == expected).all()
    assert places.document_N.tolist()[:2] == [0, -(-5000 // num_shards) if num_shards == 1 else 714]


def test_a_search_looks_at_few_rows(tmp_path: Path) -> None:
    folder = make_large_folder(tmp_path / "data", lengths("heavy tail"), num_shards=1)
    entry = load_manifest(folder).split("train")
    documents, places = open_table(folder, entry, dtype="uint16")

    class Counted:
        looked = 0

        def __getitem__(self, name: str) -> Counted:
            return self if isinstance(name, str) else self._count(name)

        def _count(self, place: np.ndarray) -> np.ndarray:
            self.looked += 1
            return documents["offset"][place]

    counted = Counted()
    documents_at(counted, np.arange(0, entry.num_tokens, 101), places=places)  # type: ignore[arg-type]
    assert counted.looked <= 2 * np.log2(5000) + 2


@pytest.mark.parametrize("rows_at_once", [1, 7, 10**6])
@pytest.mark.parametrize(
    "damage",
    [("offset", 1), ("tokens", 1), ("domain", NUM_DOMAINS), ("shard", 1), ("shard", 2**31),
     ("offset", 2**64 - 1), ("tokens", 2**64 - 1)],
)  # fmt: skip
def test_a_wrong_row_is_found_in_whatever_piece_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int, damage: tuple[str, int]
) -> None:
    monkeypatch.setattr(moe.data.document_table, "_ROWS_AT_ONCE", rows_at_once)
    folder = make_large_folder(tmp_path / "data", 2 + np.arange(60) % 5, num_shards=3)
    entry = load_manifest(folder).split("train")
    documents, places = open_table(folder, entry, dtype="uint16")
    arguments = {"places": places, "num_domains": NUM_DOMAINS, "path": folder / "train"}
    halves = [check_rows(documents, part, **arguments) for part in (range(25), range(25, 60))]
    assert tuple(map(sum, zip(*halves, strict=True))) == (entry.num_tokens, entry.num_bytes)
    column, amount = damage
    wrong = documents.copy()
    bits = 8 * wrong.dtype[column].itemsize
    wrong[column][30] = (int(wrong[column][30]) + amount) % 2**bits
    with pytest.raises(DataError, match="does not agree"):
        check_rows(wrong, range(25, 60), **arguments)
