"""What a published folder may say, and each lie that is refused with the file's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from published_folders import CONFIGS, SHAPES, random_tensors, write_file, write_folder

from moe.convert.hf_folder import open_hf_folder
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
