"""A new folder appears whole or not at all, whatever ends its making."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moe.convert.target_folder import check_target, new_folder
from moe.errors import CheckpointError, ConfigError


def test_what_was_filled_in_appears_under_its_name(tmp_path):
    target = tmp_path / "a" / "b"
    with new_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (target / "x").read_text() == "1"


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "b").mkdir()
    with new_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "b" / "x").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, CheckpointError])
def test_nothing_is_left_after_any_exception(tmp_path, error):
    def fill_and_fail() -> None:
        with new_folder(tmp_path / "a" / "b" / "c") as folder:
            (folder / "x").write_text("1")
            raise error

    with pytest.raises(error):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_was_there_stays(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "a" / "b" / "c"):
        raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "Read-only"),
    ],
)  # fmt: skip
def test_a_disk_that_refuses_is_one_message(tmp_path, number, says):
    with pytest.raises(CheckpointError, match=says), new_folder(tmp_path / "b"):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_holds_something_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name, says in (("full", "holds files"), ("link", "a link"), ("full/x", "file or a link"),
                       ("full/x/y", "is a file")):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            check_target(tmp_path / name, needed_bytes=0)


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"needs 1,000,000\.00 GB and its disk has .* free"):
        check_target(tmp_path / "new" / "x", needed_bytes=10**15)
    check_target(tmp_path / "new" / "x", needed_bytes=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="may not be written"):
        check_target(tmp_path / "x", needed_bytes=1)
