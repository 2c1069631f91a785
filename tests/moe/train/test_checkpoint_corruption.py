"""Every kind of damage is found before a tensor is handed out, and nothing is ever executed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.errors import CheckpointError
from moe.train.checkpoint import find_checkpoint, open_checkpoint, save_checkpoint
from moe.train.random_state import capture_random_state

TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
FILES = (*TENSOR_FILES, "state.json", "config.json", "tokenizer.model", "manifest.json")


def save(root: Path, step: int) -> Path:
    generator = torch.Generator().manual_seed(step)
    model = {
        "weight": torch.randn(16, 16, generator=generator),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "step": torch.tensor(step),
    }
    moments = {f"{name}.exp_avg": value.float() * 2 for name, value in model.items()}
    return save_checkpoint(
        root,
        step,
        tensors={"model": model, "optimizer": moments},
        state={"step": step, "random": capture_random_state()},
        extra_files={
            "config.json": json.dumps({"step": step}).encode(),
            "tokenizer.model": random.Random(step).randbytes(1500),
        },
        keep_last=5,
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    save(root, 100)
    save(root, 200)
    return root


def refused(folder: Path, name: str, reason: str = "") -> str:
    """Opening is refused with the file's name and what to do; the search falls back to step 100."""
    with pytest.raises(CheckpointError) as info:
        open_checkpoint(folder)
    message = str(info.value)
    assert message.startswith(f"{folder}: {name}: "), message
    assert reason in message, message
    assert "Restore the file from a copy, or delete this folder" in message
    return message


def falls_back(root: Path, *, to_step: int = 100) -> list[str]:
    skipped: list[str] = []
    checkpoint = find_checkpoint(root, on_skip=skipped.append)
    assert checkpoint is not None
    assert checkpoint.step == to_step == checkpoint.tensors("model")["step"].item()
    return skipped


def rewrite_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest as an attacker would who knows how its own hash is made."""
    content = json.loads((folder / "manifest.json").read_bytes())
    edit(content)
    content.pop("content_sha256", None)
    compact = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    content["content_sha256"] = hashlib.sha256(compact).hexdigest()
    text = json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"
    (folder / "manifest.json").write_bytes(text)


def replace_with_valid_hash(folder: Path, name: str, content: bytes) -> None:
    """Put content in place of a file, and its true size and hash into the manifest."""
    (folder / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def test_the_attackers_manifest_is_believed_when_it_is_true(newest: Path) -> None:
    before = (newest / "manifest.json").read_bytes()
    rewrite_manifest(newest, lambda manifest: None)
    assert (newest / "manifest.json").read_bytes() == before
    assert open_checkpoint(newest).step == 200


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_in_every_file(newest: Path, name: str) -> None:
    generator = random.Random(name)
    path = newest / name
    good = path.read_bytes()
    for _ in range(100):
        place, bit = generator.randrange(len(good)), generator.randrange(8)
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        path.write_bytes(bad)
        refused(newest, name)
    assert falls_back(newest.parent)[0].startswith(f"{newest}: {name}: ")
    path.write_bytes(good)
    assert falls_back(newest.parent, to_step=200) == []


def test_every_flipped_bit_of_latest_is_survived_with_the_right_checkpoint(root: Path) -> None:
    good = (root / "latest").read_bytes()
    reported = 0
    for place in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            (root / "latest").write_bytes(bad)
            reported += len(falls_back(root, to_step=200))
    assert reported == 8 * len(good)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_longer_file_is_found(newest: Path, name: str) -> None:
    good = (newest / name).read_bytes()
    for length in {0, 1, 7, 8, 9, 512, len(good) // 2, len(good) - 8, len(good) - 1} - {len(good)}:
        if length < len(good):
            (newest / name).write_bytes(good[:length])
            refused(newest, name)
    (newest / name).write_bytes(good + b"\0")
    refused(newest, name)
    assert len(falls_back(newest.parent)) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_zeroed_disk_block_is_found(newest: Path, name: str) -> None:
    good = (newest / name).read_bytes()
    for start in range(0, len(good), 512):
        block = good[start : start + 512]
        assert any(block)
        (newest / name).write_bytes(good[:start] + bytes(len(block)) + good[start + len(block) :])
        refused(newest, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(newest: Path, name: str) -> None:
    (newest / name).unlink()
    refused(newest, name, "it is missing")
    assert len(falls_back(newest.parent)) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_step_is_found(newest: Path, name: str) -> None:
    shutil.copy(newest.parent / "step_00000100" / name, newest / name)
    reason = "it belongs to step 100, not to step 200" if name == "manifest.json" else ""
    refused(newest, name, reason)
    assert len(falls_back(newest.parent)) == 1


def test_a_file_of_another_size_is_refused_without_reading_it(newest: Path) -> None:
    os.truncate(newest / "optimizer.safetensors", 2**42)  # sparse; hashing it takes an hour
    refused(newest, "optimizer.safetensors", "it has 4,398,046,511,104 bytes; the manifest says")


def test_two_files_of_one_checkpoint_swapped_are_found(newest: Path) -> None:
    os.rename(newest / "model.safetensors", newest / "kept")
    os.rename(newest / "optimizer.safetensors", newest / "model.safetensors")
    os.rename(newest / "kept", newest / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"(model|optimizer)\.safetensors: "):
        open_checkpoint(newest)


def test_a_whole_folder_under_another_steps_name_is_found(root: Path) -> None:
    shutil.copytree(root / "step_00000100", root / "step_00000300")
    refused(root / "step_00000300", "manifest.json", "it belongs to step 100, not to step 300")
    assert len(falls_back(root, to_step=200)) == 1


def test_a_link_to_another_steps_folder_is_found(root: Path) -> None:
    (root / "step_00000300").symlink_to(root / "step_00000100")
    assert "holds step 100" in falls_back(root, to_step=200)[0]


@pytest.mark.parametrize("name", FILES)
def test_a_linked_file_is_refused_even_with_the_right_content(newest: Path, name: str) -> None:
    elsewhere = newest.parent.parent / name
    os.rename(newest / name, elsewhere)
    (newest / name).symlink_to(elsewhere)
    refused(newest, name, "symbolic link")


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_or_a_folder_in_place_of_a_file_does_not_hang(newest: Path, name: str) -> None:
    (newest / name).unlink()
    os.mkfifo(newest / name)
    refused(newest, name, "not an ordinary file")
    (newest / name).unlink()
    (newest / name).mkdir()
    refused(newest, name, "not an ordinary file")


def test_only_tensor_files_matter_among_unlisted_files(newest: Path) -> None:
    (newest / "modeling_x.py").write_text("raise SystemExit('executed')")
    (newest / ".DS_Store").write_bytes(b"\0")
    assert open_checkpoint(newest).step == 200
    shutil.copy(newest / "model.safetensors", newest / "model-2.safetensors")
    refused(newest, "model-2.safetensors", "does not list this file")


def test_the_search_says_so_when_not_one_is_good(root: Path) -> None:
    for folder in root.glob("step_*"):
        (folder / "model.safetensors").write_bytes(b"")
    skipped: list[str] = []
    with pytest.raises(CheckpointError, match="not one of 2 checkpoints is good") as info:
        find_checkpoint(root, on_skip=skipped.append)
    assert len(skipped) == 2
    assert all(message in str(info.value) for message in skipped)


def test_a_missing_newest_folder_is_reported_and_survived(root: Path) -> None:
    shutil.rmtree(root / "step_00000200")
    assert "names 'step_00000200', which is not there" in falls_back(root)[0]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent: it is missing"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_a_file_changed_after_it_was_verified_is_refused(newest: Path, name: str) -> None:
    checkpoint = open_checkpoint(newest)
    bad = bytearray((newest / name).read_bytes())
    bad[-1] ^= 1
    (newest / name).write_bytes(bad)
    with pytest.raises(CheckpointError, match="changed by another program"):
        checkpoint.tensors("model") if name.startswith("model") else checkpoint.file(name)


def test_a_file_replaced_by_a_link_to_itself_after_it_was_verified_is_refused(
    newest: Path,
) -> None:
    checkpoint = open_checkpoint(newest)
    os.rename(newest / "tokenizer.model", newest / "moved")
    (newest / "tokenizer.model").symlink_to(newest / "moved")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: it is a symbolic link"):
        checkpoint.file("tokenizer.model")


ENTRY = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "parent folder": lambda m: m["files"].update({"../outside": ENTRY}),
    "absolute path": lambda m: m["files"].update({"/etc/hostname": ENTRY}),
    "inner folder": lambda m: m["files"].update({"a/b": ENTRY}),
    "dots": lambda m: m["files"].update({"..": ENTRY}),
    "no name": lambda m: m["files"].update({"": ENTRY}),
    "null byte": lambda m: m["files"].update({"a\0b": ENTRY}),
    "line end": lambda m: m["files"].update({"outside\n": ENTRY}),
    "surrogate": lambda m: m["files"].update({"\ud800": ENTRY}),
    "itself": lambda m: m["files"].update({"manifest.json": ENTRY}),
    "long name": lambda m: m["files"].update({"a" * 5000: ENTRY}),
    "table's path": lambda m: m["tensors"].update({"../model": {}}),
    "table without file": lambda m: m["tensors"].update({"third": {}}),
    "file without table": lambda m: m["tensors"].pop("model"),
    "no state": lambda m: m["files"].pop("state.json"),
    "negative size": lambda m: m["files"]["state.json"].update(size=-1),
    "float size": lambda m: m["files"]["state.json"].update(size=2.0),
    "true size": lambda m: m["files"]["state.json"].update(size=True),
    "short hash": lambda m: m["files"]["state.json"].update(sha256="00"),
    "no hash": lambda m: m["files"]["state.json"].pop("sha256"),
    "null hash": lambda m: m["files"]["state.json"].update(sha256=None),
    "file is a list": lambda m: m["files"].update({"state.json": []}),
    "files is a list": lambda m: m.update(files=[]),
    "step is text": lambda m: m.update(step="200"),
    "step is float": lambda m: m.update(step=200.0),
    "another step": lambda m: m.update(step=300),
    "no step": lambda m: m.pop("step"),
    "newer schema": lambda m: m.update(schema=2),
    "true schema": lambda m: m.update(schema=True),
    "unknown key": lambda m: m.update(_target_="os.system"),
    "shape is text": lambda m: m["tensors"]["model"].update(weight=["F32", "16"]),
    "shape is negative": lambda m: m["tensors"]["model"].update(weight=["F32", -16]),
    "no type": lambda m: m["tensors"]["model"].update(weight=[]),
    "huge number": lambda m: m.update(step=10**4000),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edited_manifest_with_a_true_hash_is_refused(newest: Path, edit) -> None:
    (newest.parent / "outside").write_bytes(b"{}")
    rewrite_manifest(newest, edit)
    with opened_paths() as opened:
        refused(newest, "manifest.json")
    assert {path for path in opened if not path.startswith(str(newest))} == set()
    assert len(falls_back(newest.parent)) == 1


TABLE_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another shape": lambda t: t.update(weight=["F32", 8, 32]),
    "another type": lambda t: t.update(weight=["I32", 16, 16]),
    "one less": lambda t: t.pop("weight"),
    "one more": lambda t: t.update(more=["F32", 1]),
    "renamed": lambda t: t.update(wEight=t.pop("weight")),
}


@pytest.mark.parametrize("edit", TABLE_EDITS.values(), ids=TABLE_EDITS.keys())
def test_a_header_that_differs_from_the_table_is_refused(newest: Path, edit) -> None:
    rewrite_manifest(newest, lambda manifest: edit(manifest["tensors"]["model"]))
    refused(newest, "model.safetensors", "differ from the manifest's table")


MANIFESTS = {
    "not json": b"\x80\x04K\x01.",
    "not utf-8": b"\xff" * 100,
    "a list": b"[]",
    "deep": b'{"schema": 1, "x": ' + b"[" * 200_000,
    "deep and closed": b'{"schema": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "only a schema": b'{"schema": 1}',
    "not a number": b'{"schema": NaN}',
    "many digits": b'{"schema": ' + b"1" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_of_another_kind_is_refused(newest: Path, content: bytes) -> None:
    (newest / "manifest.json").write_bytes(content)
    refused(newest, "manifest.json")


def test_a_key_given_twice_is_refused(newest: Path) -> None:
    path = newest / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 200', b'"step": 100,\n "step": 200'))
    refused(newest, "manifest.json", "does not match the SHA-256")


def test_a_huge_manifest_is_refused_without_reading_it(newest: Path) -> None:
    os.truncate(newest / "manifest.json", 2**40)  # sparse: takes no room on the disk
    refused(newest, "manifest.json", "at most 67,108,864 are allowed")


@pytest.mark.parametrize("content", [b"[]", b"{", b"[" * 200_000, b"\xff", b""])
def test_a_state_of_another_kind_with_a_true_hash_is_refused(newest: Path, content: bytes) -> None:
    replace_with_valid_hash(newest, "state.json", content)
    refused(newest, "state.json")


def tensor_file(header: dict[str, Any] | bytes, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(shape: list[int], start: int, end: int, *, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "empty": b"",
    "length 2^63": tensor_file({}, b"", length=2**63),
    "length 2^64-1": tensor_file({}, b"", length=2**64 - 1),
    "length past the end": tensor_file({}, b"", length=100),
    "length of 90 MiB": tensor_file({}, b"", length=90 * 2**20),
    "overlap": tensor_file({"a": one([2], 0, 8), "b": one([2], 4, 12)}, bytes(12)),
    "hole": tensor_file({"a": one([1], 0, 4), "b": one([1], 8, 12)}, bytes(12)),
    "past the end": tensor_file({"a": one([4], 0, 16)}, bytes(8)),
    "data left over": tensor_file({"a": one([1], 0, 4)}, bytes(8)),
    "negative shape": tensor_file({"a": one([-1], 0, 4)}, bytes(4)),
    "backwards": tensor_file({"a": one([1], 4, 0)}, bytes(4)),
    "huge shape": tensor_file({"a": one([2**62, 4], 0, 4)}, bytes(4)),
    "overflowing shape": tensor_file({"a": one([2**32, 2**32], 0, 0)}, b""),
    "wrong size": tensor_file({"a": one([3], 0, 4)}, bytes(4)),
    "unknown type": tensor_file({"a": one([1], 0, 4, dtype="O32")}, bytes(4)),
    "not json": tensor_file(b"{'a': 1}", b""),
    "deep": tensor_file(b"[" * 100_000, b""),
    "a list": tensor_file(b"[]", b""),
    "not utf-8": tensor_file(b"\xff\xff", b""),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_an_absurd_tensor_header_with_a_true_hash_is_refused(newest: Path, content: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    replace_with_valid_hash(newest, "model.safetensors", content)
    refused(newest, "model.safetensors")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 50 * 1024


def test_mutated_headers_with_a_true_hash_give_only_our_error(newest: Path) -> None:
    good = (newest / "model.safetensors").read_bytes()
    header_length = int.from_bytes(good[:8], "little")
    saved = open_checkpoint(newest).tensors("model")
    generator = random.Random(0)
    messages = []
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            bad[generator.randrange(8 + header_length)] = generator.randrange(256)
        replace_with_valid_hash(newest, "model.safetensors", bytes(bad))
        try:
            loaded = open_checkpoint(newest).tensors("model")
        except CheckpointError as error:
            messages.append(str(error))
        else:  # a letter of the free-text metadata
            assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert len(messages) > 200
    assert all("model.safetensors: " in message for message in messages)


class Bomb:
    """Makes a canary file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


_recorders: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _recorders and event == "open" and isinstance(arguments[0], (str, bytes)):
        _recorders[-1].append(os.fsdecode(arguments[0]))
    if _recorders and event in ("pickle.find_class", "import", "exec", "compile"):
        _recorders[-1].append(f"{event} {arguments[0]!r}")


@contextlib.contextmanager
def opened_paths() -> Iterator[list[str]]:
    """Paths that Python opens, and code that it loads, within the block."""
    if not _installed:  # an audit hook can never be removed
        sys.addaudithook(_hook)
        _installed.append(_hook)
    _recorders.append([])
    try:
        yield _recorders[-1]
    finally:
        _recorders.pop()


_installed: list[object] = []


@pytest.fixture
def bombs(tmp_path: Path) -> tuple[list[bytes], Path]:
    """A plain pickle and a torch.save archive, both proved to explode, and the canary's path."""
    canary = tmp_path / "canary"
    archive = tmp_path / "archive"
    torch.save(Bomb(canary), archive)
    contents = [pickle.dumps(Bomb(canary), protocol=4), archive.read_bytes()]
    pickle.loads(contents[0])
    canary.rmdir()
    torch.load(archive, weights_only=False)
    canary.rmdir()
    return contents, canary


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_bomb_in_place_of_a_file_never_executes(newest: Path, name: str, bombs) -> None:
    contents, canary = bombs
    good = {file: (newest / file).read_bytes() for file in FILES}
    open_checkpoint(newest).tensors("model")  # whatever is imported late is imported now
    for content in contents:
        for file in FILES:
            (newest / file).write_bytes(good[file])
        (newest / name).write_bytes(content)
        with opened_paths() as seen:
            refused(newest, name)
            if name != "manifest.json":
                replace_with_valid_hash(newest, name, content)
                if name in ("config.json", "tokenizer.model"):  # bytes that nobody reads here
                    assert open_checkpoint(newest).file(name).read_bytes() == content
                else:
                    refused(newest, name)
        assert {path for path in seen if not path.startswith(str(newest))} == set()
        assert not canary.exists()
