"""What is saved comes back bitwise, in the right order, and a refused save loses nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe.errors import CheckpointError
from moe.train import checkpoint_files
from moe.train.checkpoint import Checkpoint, find_checkpoint, open_checkpoint, save_checkpoint
from moe.train.tensor_file import DTYPE_NAMES


def save(root: Path, step: int, *, value: float = 0.0, keep_last: int = 10) -> Path:
    tensors = {"model": {"weight": torch.full((4, 3), value or float(step))}}
    return save_checkpoint(root, step, tensors=tensors, state={"step": step}, keep_last=keep_last)


def find(root: Path) -> tuple[Checkpoint, list[str]]:
    skipped: list[str] = []
    checkpoint = find_checkpoint(root, on_skip=skipped.append)
    assert checkpoint is not None
    return checkpoint, skipped


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def unusual_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 8, generator=generator)
    return {
        "float32": whole,
        "special values": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "bfloat16": torch.randn(5, 7, generator=generator).bfloat16(),
        "int64": torch.tensor([-(2**63), 2**63 - 1, 0]),
        "scalar": torch.tensor(0.1),
        "int scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "empty bfloat16": torch.empty(2, 0, dtype=torch.bfloat16),
        "transposed": whole.t(),
        "every second column": whole[:, ::2],
        "row view": whole[2],
        "same storage": whole.view(-1),
        "expanded": torch.tensor([[1.5], [2.5]]).expand(2, 4),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "name with \u00fc, / and quotes \"'": torch.tensor([True, False]),
    }


def test_tensors_come_back_bitwise_whatever_their_layout(tmp_path: Path) -> None:
    saved = unusual_tensors()
    save_checkpoint(tmp_path, 3, tensors={"model": saved}, state={}, keep_last=1)
    loaded = find(tmp_path)[0].tensors("model")
    assert set(loaded) == set(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor.detach().resolve_conj()), name


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_storable_dtype_comes_back_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    pattern = torch.arange(64, dtype=torch.uint8) % 2 if dtype is torch.bool else None
    raw = torch.arange(64, dtype=torch.uint8) * 3 if pattern is None else pattern
    saved = {"x": raw.view(dtype), "narrow": torch.ones(3, dtype=torch.uint8)}
    folder = save_checkpoint(tmp_path, 1, tensors={"model": saved}, state={}, keep_last=1)
    assert bits(open_checkpoint(folder).tensors("model")["x"]) == bits(saved["x"])
    # the public library's own reader agrees
    assert bits(load_file(folder / "model.safetensors")["x"]) == bits(saved["x"])


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    view = torch.zeros(1_000_000)[:10]
    folder = save_checkpoint(tmp_path, 1, tensors={"model": {"v": view}}, state={}, keep_last=1)
    assert (folder / "model.safetensors").stat().st_size < 300


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    weight = open_checkpoint(folder).tensors("model")["weight"]
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(bytes(len(content)))  # in place, same inode
    assert weight.eq(1.0).all()


def test_state_comes_back_equal_in_value_and_type(tmp_path: Path) -> None:
    state = {
        "text": "\u00fc\n\ud83d",
        "floats": [0.1, 1e-320, -0.0, math.inf, 2.0],
        "nan": math.nan,
        "deep": {"a": [None, True, 1, {"b": 2**70}]},
    }
    folder = save_checkpoint(tmp_path, 1, tensors={}, state=state, keep_last=1)
    assert repr(open_checkpoint(folder).state) == repr(state)


def test_extra_files_come_back_and_unknown_names_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(5_000_000))
    extra = {"tokenizer.model": source, "config.json": b"{}"}
    tensors = {"model": {}, "optimizer": {}}
    folder = save_checkpoint(
        tmp_path / "c", 1, tensors=tensors, state={}, extra_files=extra, keep_last=1
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.file("tokenizer.model").read_bytes() == source.read_bytes()
    assert checkpoint.file("config.json").read_bytes() == b"{}"
    assert checkpoint.tensors("optimizer") == {}
    with pytest.raises(CheckpointError, match=r"Did you mean 'optimizer'\?"):
        checkpoint.tensors("optimiser")
    with pytest.raises(CheckpointError, match=r"has no file '\.\./source\.bin'"):
        checkpoint.file("../source.bin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": {"a": {"b": (1, 2)}}}, "state.a.b: tuple would not come back"),
        ({"state": {"a": {1: 2}}}, "state.a: key 1 must be text"),
        ({"state": {"a": [torch.tensor(1)]}}, r"state.a\[0\]: Tensor"),
        ({"step": -1}, "step: got -1"),
        ({"step": True}, "step: got True"),
        ({"keep_last": 0}, "keep_last: got 0"),
        ({"tensors": {"../model": {}}}, "'../model' is not a plain file name"),
        ({"tensors": {"m": {"x": torch.empty(1, device="meta")}}}, "'x' has no plain values"),
        ({"tensors": {"m": {"x": torch.eye(2).to_sparse()}}}, "'x' has no plain values"),
        ({"tensors": {"m": {"x": torch.ones(1, dtype=torch.complex128)}}}, "'x' is torch.complex"),
        ({"tensors": {"m": {"__metadata__": torch.ones(1)}}}, "'__metadata__' cannot be used"),
        ({"extra_files": {"manifest.json": b""}}, "'manifest.json' is reserved"),
        ({"extra_files": {"other.safetensors": b""}}, "'other.safetensors' is reserved"),
        ({"extra_files": {"a/b": b""}}, "'a/b' is reserved or not"),
    ],
)
def test_contents_that_would_change_are_refused(tmp_path: Path, changes, message: str) -> None:
    arguments = {"step": 1, "tensors": {}, "state": {}, "keep_last": 1} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        save_checkpoint(tmp_path, arguments.pop("step"), **arguments)
    assert names(tmp_path) == []


def test_no_checkpoint_at_all_is_none_and_not_an_error(tmp_path: Path) -> None:
    skipped: list[str] = []
    assert find_checkpoint(tmp_path / "nothing", on_skip=skipped.append) is None
    (tmp_path / ".tmp-step_00000001-99999977-aa").mkdir()
    (tmp_path / "step_1").mkdir()  # not a name that is ever given
    assert find_checkpoint(tmp_path, on_skip=skipped.append) is None
    assert skipped == []


def test_the_newest_is_found_and_latest_names_it(tmp_path: Path) -> None:
    for step in (5, 99_999_999, 100_000_000, 7):
        save(tmp_path, step)
    assert (tmp_path / "latest").read_text() == "step_00000007\n"
    checkpoint, skipped = find(tmp_path)
    assert (checkpoint.step, skipped) == (100_000_000, [])


def test_keep_last_keeps_the_newest_and_nothing_else(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2)
        expected = {f"step_{s:08d}" for s in (step - 1, step) if s > 0} | {"latest"}
        assert set(names(tmp_path)) == expected


def test_keep_last_never_removes_what_was_just_saved_for_a_damaged_later_step(
    tmp_path: Path,
) -> None:
    (save(tmp_path, 200) / "state.json").write_bytes(b"{}")
    save(tmp_path, 100)
    save(tmp_path, 150, keep_last=1)
    checkpoint, skipped = find(tmp_path)
    assert checkpoint.step == 150
    assert len(skipped) == 1
    assert "step_00000200: state.json" in skipped[0]
    assert not (tmp_path / "step_00000100").exists()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4, value=1.0)
    save(tmp_path, 4, value=2.0)
    assert find(tmp_path)[0].tensors("model")["weight"].eq(2.0).all()
    assert names(tmp_path) == ["latest", "step_00000004"]


def test_a_step_that_was_set_aside_is_found_and_gets_its_name_back(tmp_path: Path) -> None:
    save(tmp_path, 4)
    os.rename(tmp_path / "step_00000004", tmp_path / ".replaced-step_00000004")
    assert find(tmp_path)[0].step == 4
    save(tmp_path, 5)
    assert names(tmp_path) == ["latest", "step_00000004", "step_00000005"]


def test_leftovers_of_killed_saves_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    for name in (".tmp-step_00000009-99999999-ab", ".trash-step_00000001-ff"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-latest-99999999-ab").write_text("step_")
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 1)
    assert names(tmp_path) == ["latest", "notes.txt", "step_00000001"]


def test_a_linked_folder_is_opened_and_removing_it_spares_its_target(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 1)
    root = tmp_path / "root"
    root.mkdir()
    (root / "step_00000001").symlink_to(elsewhere)
    assert find(root)[0].step == 1
    save(root, 2, keep_last=1)
    assert names(root) == ["latest", "step_00000002"]
    assert open_checkpoint(elsewhere).step == 1


def test_a_folder_copied_to_another_kind_of_name_still_opens(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    assert open_checkpoint(folder.rename(tmp_path / "best")).step == 4


@pytest.mark.parametrize(
    "content", [b"step_00000003\n", b"\xff\xfe", b"", b"../../x\n", b"a" * 999]
)
def test_a_wrong_latest_is_reported_and_survived(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 4)
    (tmp_path / "latest").write_bytes(content)
    checkpoint, skipped = find(tmp_path)
    assert checkpoint.step == 4
    assert len(skipped) == 1
    assert skipped[0].startswith(str(tmp_path / "latest"))


def test_a_latest_that_is_a_link_or_a_pipe_or_missing_is_survived(tmp_path: Path) -> None:
    save(tmp_path, 4)
    latest = tmp_path / "latest"
    latest.unlink()
    assert find(tmp_path)[1] == []
    latest.symlink_to(tmp_path / "step_00000004")
    assert "symbolic link" in find(tmp_path)[1][0]
    latest.unlink()
    os.mkfifo(latest)
    assert "not an ordinary file" in find(tmp_path)[1][0]


def test_everything_is_on_the_disk_before_the_step_that_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    events: list[str] = []
    temporary = ""

    def plain(path: object) -> str:
        name = str(Path(str(path)).relative_to(tmp_path))
        return name.replace(temporary, "BUILT") if temporary else name

    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor: int) -> None:
        nonlocal temporary
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        name = str(Path(path).relative_to(tmp_path))
        if not temporary and name.startswith(".tmp-step"):
            temporary = name.split("/")[0]
        events.append("sync " + (".tmp-latest" if ".tmp-latest" in name else plain(path)))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        shown = ".trash" if ".trash" in str(target) else plain(target)
        events.append(f"rename {plain(source)} {shown}")
        real_rename(source, target)

    def replace(source: Path, target: Path) -> None:
        events.append(f"replace {plain(target)}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path, 2, keep_last=1)
    assert events == [
        "sync BUILT/state.json",
        "sync BUILT/model.safetensors",
        "sync BUILT/manifest.json",
        "sync BUILT",
        "sync .tmp-latest",
        "rename BUILT step_00000002",
        "sync .",
        "replace latest",
        "sync .",
        "rename step_00000001 .trash",
    ]


def test_a_failure_while_renaming_puts_the_old_content_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4, value=1.0)
    real_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-"):
            raise OSError(5, "Input/output error", str(target))
        real_rename(source, target)

    monkeypatch.setattr(checkpoint_files.os, "rename", rename)
    with pytest.raises(CheckpointError, match=r"Input/output error.*step_00000004, is untouched"):
        save(tmp_path, 4, value=2.0)
    assert find(tmp_path)[0].tensors("model")["weight"].eq(1.0).all()
    assert names(tmp_path) == ["latest", "step_00000004"]


def test_writes_that_stop_early_are_continued(tmp_path: Path, monkeypatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:999]))
    saved = torch.randn(5000)
    save_checkpoint(tmp_path, 1, tensors={"model": {"x": saved}}, state={}, keep_last=1)
    assert torch.equal(find(tmp_path)[0].tensors("model")["x"], saved)


def test_an_interrupted_save_leaves_no_folder(tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_files, "manifest_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_a_root_that_is_a_file_gives_one_message_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot save step_00000001: Not a directory") as info:
        save(tmp_path / "root", 1)
    assert str(tmp_path / "root") in str(info.value)
    assert "No earlier checkpoint" in str(info.value)
    with pytest.raises(CheckpointError, match="cannot save step_00000001: Not a directory"):
        save(tmp_path / "root" / "inner", 1)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        find_checkpoint(tmp_path / "root", on_skip=print)


def test_a_missing_extra_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No such file or directory .*absent\.model"):
        save_checkpoint(
            tmp_path,
            1,
            tensors={},
            state={},
            extra_files={"tokenizer.model": tmp_path / "absent.model"},
            keep_last=1,
        )
    assert names(tmp_path) == []


def test_the_manifest_says_what_is_inside(tmp_path: Path) -> None:
    folder = save(tmp_path, 12)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["step"] == 12
    assert manifest["tensors"] == {"model": {"weight": ["F32", 4, 3]}}
    assert set(manifest["files"]) == {"model.safetensors", "state.json"}
    assert manifest["written_by"]["torch"] == str(torch.__version__)
