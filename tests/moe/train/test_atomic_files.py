"""moe/train/atomic_files.py: a file system that cannot flush folders serves everybody."""

from __future__ import annotations

import errno
import os
import random
import stat
from pathlib import Path

import pytest

from moe.config import DataConfig, PathsConfig, PrepareConfig, TokenizerConfig
from moe.data.prepare import prepare
from moe.errors import place_advice
from moe.train.atomic_files import make_folder, replace_file, sync_folder
from moe.train.metrics import JsonlSink, read_metrics


@pytest.fixture
def folders_cannot_be_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on VirtualBox's shared folders, some CIFS and some FUSE mounts."""
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("folders_cannot_be_flushed")
def test_text_is_prepared_where_folders_cannot_be_flushed(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    generator = random.Random(0)
    for number in range(20):
        words = generator.choices("abcdefgh", k=400)
        (texts / f"{number}.txt").write_text(f"{number} " + "".join(words))
    config = PrepareConfig(
        data=DataConfig(sources=(str(texts),), validation_fraction=0.2),
        tokenizer=TokenizerConfig(vocab_size=512),
        paths=PathsConfig(data_dir=str(tmp_path / "data")),
        num_processes=1,
    )
    manifest = prepare(config, on_progress=lambda what, done, total: None)
    assert sum(split.num_documents for split in manifest.splits) == 20


@pytest.mark.usefixtures("folders_cannot_be_flushed")
def test_a_run_goes_on_where_folders_cannot_be_flushed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first, resume_step in ((1, None), (3, 2)):
        sink = JsonlSink(path, resume_step=resume_step)
        for step in range(first, first + 4):
            sink.write(step, {"step": step})
        sink.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    replace_file(tmp_path / "one.json", b"{}")
    assert (tmp_path / "one.json").read_bytes() == b"{}"


def test_another_fault_of_the_disk_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is Linux's")
def test_a_file_system_that_takes_no_folder_refuses_it_by_name() -> None:
    with pytest.raises(PermissionError, match="takes no new folder") as refused:
        make_folder(Path("/proc/phimoe/run"))
    assert refused.value.filename == "/proc/phimoe"


@pytest.mark.parametrize(
    ("number", "is_full"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EROFS, False)],
)
def test_only_a_full_disk_is_to_be_freed(number: int, is_full: bool) -> None:
    advice = place_advice(OSError(number, os.strerror(number)), "target")
    assert ("Free space" in advice) == is_full
    assert "target to a place that you may write" in advice
