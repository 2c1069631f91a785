"""moe/data/verify.py: each byte is hashed once, by all ranks, and again when it has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import moe.data.verified_stamp
import moe.data.verify
from moe.data.manifest import load_manifest
from moe.data.shards import open_split
from moe.data.verified_stamp import STAMP_NAME
from moe.data.verify import verify_data
from moe.errors import DataError


@pytest.fixture
def folder(short_documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared data that nobody has verified, whose files count as settled at once."""
    monkeypatch.setattr(moe.data.verified_stamp, "_SETTLED_SECONDS", -60.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = tmp_path / "data"
    shutil.copytree(short_documents, target, ignore=shutil.ignore_patterns(STAMP_NAME))
    return target


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed, in the order of their ends."""
    names: list[str] = []
    original = moe.data.verify.require_hash

    def require_hash(folder: Path, entry, **arguments) -> None:
        original(folder, entry, **arguments)
        names.append(entry.name)

    monkeypatch.setattr(moe.data.verify, "require_hash", require_hash)
    return names


class Rank:
    """One of several threads that stand for ranks."""

    def __init__(self, rank: int, texts: list[str], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(texts)
        self._texts, self._barrier = texts, barrier

    def all_texts(self, text: str) -> list[str]:
        self._texts[self.rank] = text
        self._barrier.wait(timeout=60)
        everybody = list(self._texts)
        self._barrier.wait(timeout=60)
        return everybody


def on_ranks(world_size: int, work: Callable[[Rank], object]) -> list[Exception | None]:
    """What each rank's work raised."""
    texts, barrier = [""] * world_size, threading.Barrier(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        jobs = [pool.submit(work, Rank(rank, texts, barrier)) for rank in range(world_size)]
        return [job.exception() for job in jobs]  # type: ignore[misc]


def names_of(folder: Path, *splits: str) -> list[str]:
    manifest = load_manifest(folder)
    names = [manifest.tokenizer.name]
    for entry in map(manifest.split, splits):
        names += [file.name for file in (*entry.shards, entry.documents)]
    return sorted(names)


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_all_ranks_together_hash_each_file_once_and_the_next_start_none(
    folder: Path, hashed: list[str], world_size: int
) -> None:
    told: list[int] = []

    def work(rank: Rank) -> None:
        verify_data(folder, ranks=rank, progress=told.append)

    assert on_ranks(world_size, work) == [None] * world_size
    assert sorted(hashed) == names_of(folder, "train", "validation")
    manifest = load_manifest(folder)
    tables = sum(48 + 30 * entry.num_documents for entry in manifest.splits)
    assert sum(told) >= sum(file.num_bytes for file in manifest.files()) > tables
    hashed.clear()
    assert on_ranks(2, work) == [None, None]
    open_split(folder, "train", verify=True)
    assert hashed == []


def test_a_split_is_verified_without_the_other(folder: Path, hashed: list[str]) -> None:
    open_split(folder, "validation", verify=True)
    assert sorted(hashed) == names_of(folder, "validation")
    hashed.clear()
    verify_data(folder)
    assert sorted(hashed) == sorted(set(names_of(folder, "train")) - {"tokenizer.model"})


def test_what_was_written_since_is_hashed_again_and_found(folder: Path, hashed: list[str]) -> None:
    verify_data(folder)
    hashed.clear()
    path = folder / "train-00000.tokens"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copying program does
    with pytest.raises(DataError, match=r"train-00000\.tokens: its content changed"):
        verify_data(folder)
    content[100] ^= 1
    path.write_bytes(content)
    verify_data(folder)
    assert hashed == [path.name]


def test_a_file_of_this_moment_is_not_believed_by_its_time(
    folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe.data.verified_stamp, "_SETTLED_SECONDS", 3600.0)
    verify_data(folder)
    assert not (folder / STAMP_NAME).exists()
    verify_data(folder)
    assert len(hashed) == 2 * len(names_of(folder, "train", "validation"))


def test_the_error_of_one_rank_is_the_error_of_all(folder: Path) -> None:
    path = folder / "validation-00000.tokens"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    errors = on_ranks(3, lambda rank: verify_data(folder, ranks=rank))
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, DataError) for error in errors)
    assert "validation-00000.tokens: its content changed" in str(errors[0])
    assert not (folder / STAMP_NAME).exists()


@pytest.mark.parametrize("damage", ["offset", "bytes"])
def test_a_table_that_is_wrong_under_its_right_hash_is_found_by_all_together(
    folder: Path, damage: str
) -> None:
    path = folder / "train.documents.npy"
    table = np.load(path)
    table[damage][200] += 3
    np.save(path, table)
    manifest = folder / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["splits"][0]["documents"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    fields.pop("seal")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    manifest.write_text(json.dumps(fields | {"seal": hashlib.sha256(text.encode()).hexdigest()}))
    errors = on_ranks(3, lambda rank: verify_data(folder, ranks=rank))
    assert {str(error).split(": ")[1].split(";")[0] for error in errors} == {
        "does not agree with the shards and the manifest"
    }


def test_ranks_with_copies_of_their_own_verify_each_copy_whole(
    folder: Path, tmp_path: Path, hashed: list[str]
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")

    def work(rank: Rank) -> None:
        verify_data(folder if rank.rank < 2 else other, ranks=rank)

    assert on_ranks(4, work) == [None] * 4
    assert sorted(hashed) == sorted(2 * names_of(folder, "train", "validation"))
    assert (folder / STAMP_NAME).exists()
    assert (other / STAMP_NAME).exists()


def test_machines_with_different_data_are_told(
    folder: Path, tmp_path: Path, other_data: Path
) -> None:
    errors = on_ranks(
        2, lambda rank: verify_data(folder if rank.rank == 0 else other_data, ranks=rank)
    )
    assert all("rank 1 finds other data in" in str(error) for error in errors)


@pytest.fixture
def other_data(folder: Path, tmp_path: Path) -> Path:
    """Another text's data."""
    target = shutil.copytree(folder, tmp_path / "another")
    fields = json.loads((target / "manifest.json").read_text())
    fields["fingerprint"] = "0" * 64
    fields.pop("seal")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    seal = hashlib.sha256(text.encode()).hexdigest()
    (target / "manifest.json").write_text(json.dumps(fields | {"seal": seal}))
    return target


@pytest.mark.parametrize("has_cache", [True, False])
def test_where_the_folder_cannot_be_written_the_stamp_lies_in_the_users_cache(
    folder: Path, tmp_path: Path, hashed: list[str], has_cache: bool
) -> None:
    # a folder of the stamp's name stands in for one that may not be written, also for root
    (folder / STAMP_NAME).mkdir()
    if not has_cache:
        (tmp_path / "cache").write_text("a file")
    verify_data(folder)
    assert list((tmp_path / "cache").rglob("*.json")) == [] or has_cache
    hashed.clear()
    verify_data(folder)
    assert (hashed == []) == has_cache


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 1, "files": {"x": [1]}}'])
def test_a_stamp_that_cannot_be_read_is_none(folder: Path, hashed: list[str], content: str) -> None:
    (folder / STAMP_NAME).write_text(content)
    verify_data(folder)
    assert sorted(hashed) == names_of(folder, "train", "validation")
    assert json.loads((folder / STAMP_NAME).read_text())["version"] == 1


def test_what_takes_long_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    verify_data(folder, say=lines.append)
    assert lines == []
    (folder / STAMP_NAME).unlink()
    monkeypatch.setattr(moe.data.verify, "_SAY_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(moe.data.verify, "_SAY_EVERY_SECONDS", 0.0)
    verify_data(folder, say=lines.append)
    assert len(lines) > 3
    assert "data: verifying, 0.0 of 0.0 GB a rank" in lines[0]
    assert f"{folder / STAMP_NAME} says so from now on" in lines[-1]
