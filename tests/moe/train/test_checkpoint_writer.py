"""All ranks save one checkpoint, in the foreground or while training goes on, or none of them does.

The ranks are real processes over gloo: checkpoint_ranks.py runs every scenario once, and the tests
look at what each rank saw.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_crashes import content
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharded_saves import random_tiling, save_as_ranks

from moe.errors import CheckpointError
from moe.parallel.pieces import Piece
from moe.parallel.processes import Processes
from moe.train import checkpoint_writer, host_copy, tensor_file
from moe.train.checkpoint import find_checkpoint, open_checkpoint, save_checkpoint
from moe.train.checkpoint_manifest import FileRecord
from moe.train.checkpoint_verify import share_of_files
from moe.train.checkpoint_writer import CheckpointWriter
from moe.train.host_copy import HostCopies
from moe.train.tensor_file import TensorToWrite, bytes_of
from moe.train.tensor_header import TensorRecord

PROGRAM = Path(__file__).with_name("checkpoint_ranks.py")
ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank returned, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[3]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), "scenarios"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    for name, ranks in report.items():
        assert not [r for r in ranks if isinstance(r, dict) and "error" in r], (name, result.stderr)
    return report


def test_all_ranks_save_and_see_the_same_checkpoint(seen) -> None:
    first, *others = seen["in_the_foreground"]
    assert others == [first] * 2
    assert (first["steps"], first["folder"]) == ([1, 2, 3], "step_00000003")
    assert first["num_bytes"] + first["manifest"] == first["on_disk"]


def test_in_the_background_nothing_is_there_before_all_ranks_have_written(seen) -> None:
    for rank in seen["in_the_background"]:
        assert rank["first"]
        assert rank["polled"] == [None, None, None]
        assert rank["names"] == [".tmp"]


def test_a_save_waits_for_the_one_before_and_says_so(seen) -> None:
    for rank in seen["in_the_background"]:
        assert (rank["before"], rank["last"]) == (2, 3)
        assert 0.3 <= rank["waited"] <= rank["stall"]
        assert rank["write"] >= 0.3  # of the slowest rank


def test_a_refusal_on_one_rank_is_raised_on_all_with_that_rank_named(seen) -> None:
    first, other = seen["a_rank_is_refused"]
    assert first == other
    for (kind, message), step in zip(first, (2, 12), strict=True):
        assert kind == "CheckpointError"
        assert f"cannot save step_{step:08d}: rank 1: File too large" in message
        assert f"step_{step - 1:08d}, is untouched and still good. Raise the file-size" in message


def test_a_folder_that_cannot_be_made_or_named_is_refused_on_all_ranks(seen) -> None:
    first, other = seen["the_folder_is_refused"]
    assert first == other
    assert [kind for kind, _ in first] == ["CheckpointError"] * 2
    assert "rank 0: Not a directory" in first[0][1]
    assert "rank 0: Input/output error" in first[1][1]


def test_a_bug_on_one_rank_keeps_its_own_error_and_stops_the_others(seen) -> None:
    first, other = seen["a_rank_has_a_bug"]
    assert other == ["MemoryError", "no room for copies"]
    assert first[0] == "CheckpointError"
    assert "rank 1: MemoryError: no room for copies" in first[1]


WRONG = {
    "gap": "rank 1: its 'weight' begins with element 32, and nothing holds those from 31 on",
    "overlap": "rank 1: its 'weight' has elements 30 to 59, and rank 0 has them up to 31",
    "no end": "rank 1: its 'weight' ends with element 59 of 60",
    "twice": "rank 1 has them up to 60",
    "another type": "rank 1 has 'weight' as F64 of shape [4, 15], and rank 0 as F32",
    "another shape": "rank 1 has 'weight' as F32 of shape [60], and rank 0 as F32 of shape [4, 15]",
    "outside": "has 60 elements; a piece of it has 29 from 50 on",
    "negative": "a piece of it has 29 from -1 on",
    "range name": "it reads like a range",
    "complex": "is torch.complex128; these can be stored",
    "shard's stem": "is not a plain file name, or a shard's",
    "another step": "saves step",
    "state": "state.a: tuple would not come back the same",
    "file": "'manifest.json' is reserved",
}


def test_every_wrong_content_has_its_case(seen) -> None:
    assert seen["contents_are_refused"][0].keys() == WRONG.keys()


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_whole_tensor_is_refused_on_all_ranks_before_anything_is_made(
    seen, case
) -> None:
    for rank, messages in enumerate(seen["contents_are_refused"]):
        kind, message = messages[case]
        assert kind in ("ValueError", "TypeError")
        assert WRONG[case] in message
        assert rank == 1 or "rank 1" in message


def test_what_ranks_hold_is_told_only_when_it_changes(seen) -> None:
    for rank in seen["the_layout_changes"]:
        assert rank["told"] == [True, False, True, False, True]


def test_a_stem_that_one_rank_holds_whole_is_one_plain_file(seen) -> None:
    four, five = seen["the_layout_changes"][0]["files"]
    assert [name for name in four if name.endswith(".safetensors")] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors",
        "schedule.safetensors",
    ]  # fmt: skip
    assert five == ["manifest.json", "model.safetensors", "state.json"]


def test_every_rank_takes_the_same_checkpoint_with_the_same_message(seen) -> None:
    ranks = seen["every_rank_hashes_a_share"]
    assert [rank["step"] for rank in ranks] == [1] * 4
    assert [rank["absent"] for rank in ranks] == [True] * 4
    assert len({tuple(rank["skipped"]) for rank in ranks}) == 1
    (message,) = ranks[0]["skipped"]
    assert "optimizer-00001-of-00002.safetensors: its SHA-256" in message


def test_each_file_is_hashed_by_one_rank(seen) -> None:
    ranks = seen["every_rank_hashes_a_share"]
    hashed = [name for rank in ranks for name in rank["hashed"]]
    # two checkpoints, then two of which the other ranks hash their shares
    assert hashed.count("model-00001-of-00002.safetensors") in (3, 4)
    assert all(0 < len(set(rank["hashed"])) < 7 for rank in ranks)
    names = [set(rank["hashed"]) for rank in ranks]
    assert all(not (a & b) for a, b in itertools.combinations(names, 2))


def test_a_rank_that_sees_another_disk_is_named_with_the_fix(seen) -> None:
    for rank in seen["every_rank_hashes_a_share"]:
        kind, message = rank["apart"]
        assert kind == "CheckpointError"
        assert "rank 1 does not read the manifest.json that rank 0 reads" in message
        assert "Put the run folder on a disk that all ranks share." in message


def test_shares_of_files_are_of_even_size_and_each_file_is_in_one() -> None:
    files = tuple(FileRecord(f"f{i}", size, "") for i, size in enumerate((9, 1, 5, 4, 8, 3, 3, 3)))
    shares = [share_of_files(files, rank, world_size=3) for rank in range(3)]
    assert sorted(record.name for share in shares for record in share) == [f.name for f in files]
    assert [sum(record.size for record in share) for share in shares] == [12, 12, 12]


def test_one_process_saves_in_the_background_what_the_tensors_were(
    tmp_path: Path, monkeypatch
) -> None:
    may_write = threading.Event()
    real = checkpoint_writer.write_files

    def write_files(*arguments: Any, **named: Any) -> Any:
        assert may_write.wait(30)
        return real(*arguments, **named)

    monkeypatch.setattr(checkpoint_writer, "write_files", write_files)
    writer = CheckpointWriter(tmp_path, processes=ALONE, keep_last=1, in_background=True)
    weight = torch.arange(12.0).view(3, 4)
    pieces = {"model": [Piece("weight", (4, 3), 0, weight.t())]}
    assert writer.save(1, pieces=pieces, state={}) is None
    weight.fill_(-1)
    assert writer.poll() is None
    may_write.set()
    saved = writer.finish()
    assert saved is not None
    assert saved.folder == tmp_path / "step_00000001"
    loaded = open_checkpoint(saved.folder).tensors("model")["weight"]
    assert torch.equal(loaded, torch.arange(12.0).view(3, 4).t())
    assert (saved.folder / "model.safetensors").exists()
    assert writer.finish() is None


def test_an_interrupt_while_a_save_is_waited_for_leaves_no_folder(
    tmp_path: Path, monkeypatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    writer = CheckpointWriter(tmp_path, processes=ALONE, keep_last=1, in_background=True)
    monkeypatch.setattr(checkpoint_writer, "write_manifest", interrupt)
    writer.save(1, pieces={"model": [Piece("x", (1,), 0, torch.ones(1))]}, state={})
    with pytest.raises(KeyboardInterrupt):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_saves_of_one_writer_remove_what_killed_ones_left_and_keep_the_newest(
    tmp_path: Path,
) -> None:
    (tmp_path / ".tmp-step_00000001-99999999-ab").mkdir()
    writer = CheckpointWriter(tmp_path, processes=ALONE, keep_last=2, in_background=True)
    done = []
    for step in range(1, 5):
        pieces = {"model": [Piece("x", (1,), 0, torch.full((1,), float(step)))]}
        done.append(writer.save(step, pieces=pieces, state={}))
    done.append(writer.finish())
    assert [saved.step for saved in done if saved] == [1, 2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step_00000003",
        "step_00000004",
    ]


def test_save_checkpoint_and_a_writer_alone_write_the_same_files(tmp_path: Path) -> None:
    tensors = content(3, 0, 40)
    folder = save_checkpoint(tmp_path / "a", 3, tensors=tensors, state={"a": 1}, keep_last=1)
    writer = CheckpointWriter(tmp_path / "b", processes=ALONE, keep_last=1, in_background=True)
    pieces = {
        stem: [Piece(name, tuple(t.shape), 0, t) for name, t in table.items()]
        for stem, table in tensors.items()
    }
    writer.save(3, pieces=pieces, state={"a": 1})
    saved = writer.finish()
    assert saved is not None
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (saved.folder / name).read_bytes() == (folder / name).read_bytes()


def test_copies_lie_one_after_the_other_in_blocks_that_are_used_again(monkeypatch) -> None:
    """What the pinned copies of a GPU's tensors do, with blocks of 8 bytes of ordinary memory."""
    made: list[torch.Tensor] = []

    def new_block(num_bytes: int) -> torch.Tensor:
        made.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return made[-1]

    monkeypatch.setattr(host_copy, "_BLOCK_BYTES", 8)
    monkeypatch.setattr(host_copy, "_new_block", new_block)
    copies = HostCopies()
    for _ in range(2):
        place = 0
        for length in (3, 5, 0, 13, 8, 2):
            raw = torch.arange(place, place + length, dtype=torch.uint8)
            parts = copies._into_blocks(raw, place)
            assert b"".join(bytes(bytes_of(part)) for part in parts) == bytes(raw.tolist())
            place += length
        assert len(made) == 4
    assert torch.cat(made)[:31].tolist() == list(range(31))


def test_a_copy_is_of_the_values_and_not_of_the_tensor() -> None:
    value = torch.arange(6.0).view(2, 3)
    record = TensorRecord("F32", (3, 2))
    copied = HostCopies().copy({"model": {"x": TensorToWrite(record, (value.t(),))}})
    value.zero_()
    ((values,), kept) = copied["model"]["x"].values, copied["model"]["x"].record
    assert kept == record
    assert torch.equal(values, torch.arange(6.0).view(2, 3).t())
    assert values.is_contiguous()


TYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64)


@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    num_ranks=st.integers(1, 5),
    num_cuts=st.integers(0, 9),
    seed=st.integers(0, 2**32),
)
def test_any_tiling_over_any_ranks_is_read_back_at_any_range(
    tmp_path: Path, monkeypatch, shapes, num_ranks: int, num_cuts: int, seed: int
) -> None:
    monkeypatch.setattr(tensor_file, "_BUFFER_BYTES", 16)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a disk would wait at thousands
    generator = random.Random(seed)
    tensors = {
        f"t{i}": torch.randint(0, 200, shape).to(generator.choice(TYPES))
        for i, shape in enumerate(shapes)
    }
    tiling = random_tiling(tensors, num_ranks, generator, num_cuts=num_cuts)
    ranks = [{"model": held} for held in tiling]
    folder = save_as_ranks(tmp_path, 1, ranks, state={"seed": seed}, extra_files={})
    found = find_checkpoint(tmp_path, on_skip=pytest.fail)
    assert found is not None
    assert found.state == {"seed": seed}
    loaded = found.tensors("model")
    into = {
        name: torch.empty(tensor.shape, dtype=torch.float64) for name, tensor in tensors.items()
    }
    found.copy_tensors("model", into)
    assert found.hashes("model") == {
        name: hashlib.sha256(bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(into[name], tensor.double())
        flat = tensor.reshape(-1)
        start, end = sorted(generator.randint(0, len(flat)) for _ in range(2))
        for dtype in (tensor.dtype, torch.float32):
            part = torch.full((end - start,), 99, dtype=dtype)
            found.read_range("model", name, start, part)
            assert torch.equal(part, flat[start:end].to(dtype))
        with pytest.raises(ValueError, match="were asked for"):
            found.read_range("model", name, start, torch.empty(len(flat) - start + 1))
    with pytest.raises(CheckpointError, match="model has no tensor 'q'"):
        found.read_range("model", "q", 0, torch.empty(0))
    assert folder == found.folder


def test_bytes_on_their_way_to_the_disk_are_told_from_the_thread_that_writes(
    tmp_path: Path,
) -> None:
    told: list[tuple[int, bool]] = []

    def progress(amount: int) -> None:
        told.append((amount, threading.current_thread() is threading.main_thread()))

    writer = CheckpointWriter(
        tmp_path, processes=ALONE, keep_last=1, in_background=True, progress=progress
    )
    values = torch.zeros(3 * 2**20)  # 12 MiB: pieces of 4
    writer.save(1, pieces={"model": [Piece("weight", (len(values),), 0, values)]}, state={})
    saved = writer.finish()
    assert saved is not None
    of_tensors = [amount for amount, is_main in told if not is_main]
    assert sum(of_tensors) >= saved.num_bytes > 12 * 2**20
    assert max(of_tensors) <= 4 * 2**20
