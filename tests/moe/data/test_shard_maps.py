"""moe/data/shard_maps.py: any number of shards with few maps and no descriptors."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from moe.data.manifest import FileEntry
from moe.data.shard_maps import ShardMaps
from moe.errors import DataError


@pytest.fixture
def files(tmp_path: Path) -> list[FileEntry]:
    """40 shards of 1,000 tokens: each its own number."""
    for number in range(40):
        (tmp_path / f"{number}.tokens").write_bytes(np.full(1000, number, "<u2").tobytes())
    return [FileEntry(f"{number}.tokens", 2000, "") for number in range(40)]


def maps_of(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


def test_only_so_many_are_mapped_and_a_view_outlives_them(
    tmp_path: Path, files: list[FileEntry]
) -> None:
    shards = ShardMaps(tmp_path, files, np.dtype("<u2"), most=3)
    view = shards[0][10:20]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number, shard in enumerate(shards):
            assert len(shard) == 1000
            assert shard[999] == number
            assert maps_of(tmp_path) <= 5  # three, the view's, and the loop's
    del shard
    assert len(os.listdir("/proc/self/fd")) == before
    assert view.tolist() == [0] * 10
    del view, shards
    assert maps_of(tmp_path) == 0


def test_a_shard_cannot_be_written(tmp_path: Path, files: list[FileEntry]) -> None:
    shard = ShardMaps(tmp_path, files, np.dtype("<u2"))[5]
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 1


def test_where_there_is_room_for_fewer_maps_there_are_fewer(
    tmp_path: Path, files: list[FileEntry]
) -> None:
    size = 2**30
    large = [FileEntry(file.name, size, "") for file in files]
    for file in large:
        os.truncate(tmp_path / file.name, size)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    shards = ShardMaps(tmp_path, large, np.dtype("<u2"))
    resource.setrlimit(resource.RLIMIT_AS, (used + 5 * size, limits[1]))
    try:
        numbers = [int(shard[0]) for shard in shards]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert numbers == list(range(40))


@pytest.mark.parametrize("damage", ["gone", "shorter", "link"])
def test_a_shard_that_changes_under_a_run_is_named(
    tmp_path: Path, files: list[FileEntry], damage: str
) -> None:
    path = tmp_path / "7.tokens"
    path.unlink()
    if damage == "shorter":
        path.write_bytes(b"x")
    elif damage == "link":
        path.symlink_to(tmp_path / "8.tokens")
    with pytest.raises(DataError, match=r"7\.tokens: cannot be mapped"):
        ShardMaps(tmp_path, files, np.dtype("<u2"))[7]
