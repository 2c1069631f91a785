"""What a published folder may say, and each lie that is refused with the file's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from published_folders import CONFIGS, SHAPES, random_tensors, write_file, write_folder

from moe.convert.hf_folder import is_hf_folder, open_hf_folder
from moe.convert.import_model import import_model
from moe.errors import CheckpointError

CONFIG = CONFIGS["phi3 mha"]
TENSORS = random_tensors(SHAPES["phi3"](CONFIG))
INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path):
    return write_folder(tmp_path / "hf", CONFIG, TENSORS)


@pytest.fixture
def sharded(tmp_path):
    return write_folder(tmp_path / "hf", CONFIG, TENSORS, num_shards=3)


def shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05d}-of-00003.safetensors"


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path, *says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_hf_folder(folder)
    for text in says:
        assert text in str(caught.value)


def test_one_file_and_shards_hold_the_same_tensors(single, tmp_path):
    other = write_folder(tmp_path / "other", CONFIG, TENSORS, num_shards=4)
    a, b = open_hf_folder(single), open_hf_folder(other)
    assert a.config == b.config == CONFIG
    assert a.tensors.keys() == b.tensors.keys() == TENSORS.keys()
    assert {tensor.path.name for tensor in b.tensors.values()} == {
        f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)
    }


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "x.bin", "", 3, None,
     "a\\b.safetensors", ".hidden.safetensors", "x\n.safetensors"],
)  # fmt: skip
def test_an_index_that_names_anything_but_a_plain_file_is_refused(sharded, name):
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refused(sharded, INDEX, "model.norm.weight", "without any path")


@pytest.mark.parametrize("value", [None, {}, [], "x", 3])
def test_an_index_without_a_map_is_refused(sharded, value):
    edit_index(sharded, lambda index: index.update(weight_map=value))
    refused(sharded, INDEX, "weight_map")


def test_a_key_twice_in_the_index_is_refused(sharded):
    text = (sharded / INDEX).read_text()
    name = shard(sharded, 1).name
    double = text.replace('"weight_map": {', f'"weight_map": {{"model.norm.weight": "{name}", ')
    (sharded / INDEX).write_text(double)
    refused(sharded, INDEX, "'model.norm.weight' is given twice")


def test_a_key_in_two_shards_is_refused(sharded):
    first = open_hf_folder(sharded)
    key = next(k for k, t in first.tensors.items() if t.path == shard(sharded, 1))
    part = {k: TENSORS[k] for k, t in first.tensors.items() if t.path == shard(sharded, 2)}
    write_file(shard(sharded, 2), {**part, key: TENSORS[key]})
    refused(sharded, shard(sharded, 2).name, key, "too")


def test_a_shard_with_a_key_that_the_index_does_not_list_is_refused(sharded):
    part = dict(list(TENSORS.items())[::3])
    write_file(shard(sharded, 1), {**part, "extra": np.ones(2, np.float32)})
    refused(sharded, shard(sharded, 1).name, "extra", "does not list")


def test_a_shard_without_a_key_that_the_index_lists_is_refused(sharded):
    edit_index(sharded, lambda i: i["weight_map"].update(more=shard(sharded, 2).name))
    refused(sharded, shard(sharded, 2).name, "does not hold more")


def test_a_missing_shard_is_named(sharded):
    shard(sharded, 3).unlink()
    refused(sharded, shard(sharded, 3).name, "is missing", "Copy the folder again")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_is_refused_with_the_way_to_copy(single, name, tmp_path):
    shutil.move(single / name, tmp_path / name)
    (single / name).symlink_to(tmp_path / name)
    refused(single, name, "symbolic link", "cp -rL")


def test_a_linked_shard_is_refused(sharded, tmp_path):
    shutil.move(shard(sharded, 2), tmp_path / "x")
    shard(sharded, 2).symlink_to(tmp_path / "x")
    refused(sharded, shard(sharded, 2).name, "symbolic link")


def test_a_single_file_beside_an_index_is_refused(sharded):
    write_file(sharded / "model.safetensors", TENSORS)
    refused(sharded, "has both", INDEX)


def test_pickles_are_named_and_not_read(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, "pytorch_model.bin is a pickle", "safe_serialization")


def test_a_folder_without_tensors_or_configuration_says_what_is_missing(single):
    (single / "model.safetensors").unlink()
    refused(single, "neither model.safetensors nor")
    (single / "config.json").unlink()
    refused(single, "config.json: is missing")


@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_a_truncated_file_is_named(single, cut):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    refused(single, "model.safetensors: its tensors end", "truncated", "Copy the folder again")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff"])
def test_a_configuration_that_is_no_json_object_is_named(single, raw):
    (single / "config.json").write_bytes(raw)
    refused(single, "config.json: ")


def in_the_cache(folder: Path, cache: Path) -> Path:
    """The files as the Hugging Face cache keeps them: a snapshot of links into blobs/."""
    model = cache / "models--some--model"
    snapshot, blobs = model / "snapshots" / "0123abc", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / f"hash{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"hash{number}")
    return snapshot


def test_a_snapshot_of_the_hugging_face_cache_opens_where_it_is(tmp_path, short_documents):
    config = CONFIG | {"vocab_size": 576}
    tensors = random_tensors(SHAPES["phi3"](config))
    sharded = write_folder(tmp_path / "hf", config, tensors, num_shards=3)
    shutil.copy(short_documents / "tokenizer.model", sharded)
    snapshot = in_the_cache(sharded, tmp_path / "cache")
    (tmp_path / "here").symlink_to(snapshot)  # the way to the snapshot may be a link, too
    expected = open_hf_folder(sharded)
    for number, folder in enumerate((snapshot, tmp_path / "here")):
        found = open_hf_folder(folder)
        assert found.config == config
        assert {key: tensor[1:] for key, tensor in found.tensors.items()} == {
            key: tensor[1:] for key, tensor in expected.tensors.items()
        }
        ours, theirs = (tmp_path / f"{name}{number}" for name in ("ours", "theirs"))
        for source, target in ((folder, ours), (sharded, theirs)):
            import_model(
                source, target, window="original", tokenizer=None, on_progress=lambda *_: None
            )
        for name in ("model.safetensors", "tokenizer.model", "config.json"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.parametrize("where", ["outside", "another model's blobs", "below", "a link again"])
def test_a_link_that_leaves_the_cache_is_refused(single, tmp_path, where):
    snapshot = in_the_cache(single, tmp_path / "cache")
    blobs = snapshot.parents[1] / "blobs"
    target = {
        "outside": tmp_path / "x", "another model's blobs": tmp_path / "cache/models--b/blobs/x",
        "below": blobs / "sub/x", "a link again": blobs / "x",
    }[where]  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(single / "model.safetensors", tmp_path / "other")
    if where == "a link again":
        target.symlink_to(tmp_path / "other")
    else:
        shutil.copy(tmp_path / "other", target)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(target)
    refused(snapshot, "model.safetensors", "symbolic link")


def test_an_adapter_and_a_gguf_folder_are_named_for_what_they_are(tmp_path):
    for name, words in (
        ("adapter_config.json", ["PEFT adapter", "merge_and_unload"]),
        ("model-q4.gguf", ["model-q4.gguf", "llama.cpp", "folder that it was made from"]),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        assert is_hf_folder(folder)
        refused(folder, *words)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", INDEX])
def test_a_git_lfs_pointer_is_called_one(single, name):
    if name == INDEX:
        (single / "model.safetensors").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4942\n"
    (single / name).write_text(pointer)
    refused(single, name, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_taken_off_and_said(tmp_path, prefix):
    folder = write_folder(tmp_path / "hf", CONFIG, {prefix + k: v for k, v in TENSORS.items()})
    found = open_hf_folder(folder)
    assert found.tensors.keys() == TENSORS.keys()
    done = import_model(
        folder, tmp_path / "ours", window="original", tokenizer=None, on_progress=lambda *_: None
    )
    assert "prefix of a wrapper" in done.notes[0]


def test_a_compiled_part_beside_the_part_itself_is_refused(tmp_path):
    double = {**TENSORS, "model._orig_mod.norm.weight": TENSORS["model.norm.weight"]}
    refused(write_folder(tmp_path / "hf", CONFIG, double), "model.norm.weight is there twice")
