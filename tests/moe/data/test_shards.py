"""moe/data/shards.py and manifest.py: what is written is read back, and every damage is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.config import DataConfig, PathsConfig, PrepareConfig, TokenizerConfig
from moe.data.manifest import read_manifest
from moe.data.prepare import prepare
from moe.data.shards import open_split, token_dtype
from moe.data.tokenizer import Tokenizer
from moe.errors import DataError


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of made-up words in two domains."""
    folder = tmp_path_factory.mktemp("source") / "texts"
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(400)]
    for number in range(40):
        path = folder / ("law" if number % 2 else "news") / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(generator.choices(words, k=generator.randint(20, 200))))
    return folder


@pytest.fixture(scope="module")
def original(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("data") / "prepared"
    config = PrepareConfig(
        data=DataConfig(sources=(str(texts),), validation_fraction=0.2),
        tokenizer=TokenizerConfig(vocab_size=512),
        paths=PathsConfig(data_dir=str(target)),
        num_processes=1,
    )
    prepare(config, on_progress=lambda what, done, total: None, shard_bytes=3000)
    return target


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "prepared"))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None], *, seal: bool) -> None:
    """Change manifest.json, with a right seal if wanted: what an attacker would do."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    if seal:
        fields.pop("seal", None)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        fields["seal"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(fields))


def test_documents_come_back_as_their_text(folder: Path, texts: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer.model", vocab_size=512)
    found = []
    for name in ("train", "validation"):
        split = open_split(folder, name, verify=True)
        assert split.domains == ("law", "news")
        for number in range(split.num_documents):
            ids = split.tokens(number)
            assert ids[0] == tokenizer.bos_id
            assert ids[-1] == tokenizer.end_of_text_id
            text = tokenizer.decode(ids[1:-1].tolist())
            assert len(text.encode()) == split.documents["bytes"][number]
            found.append((split.domains[split.documents["domain"][number]], text))
    expected = [(path.parent.name, path.read_text()) for path in texts.glob("*/*.txt")]
    assert sorted(found) == sorted(expected)


def test_the_manifest_counts_what_is_there(folder: Path) -> None:
    manifest = read_manifest(folder, verify=True)
    assert len(manifest.split("train").shards) > 2
    for entry in manifest.splits:
        split = open_split(folder, entry.name, verify=True)
        assert entry.num_documents == split.num_documents
        assert entry.num_tokens == sum(len(shard) for shard in split.shards)
        assert entry.num_bytes == split.documents["bytes"].sum()
        assert sum(d.num_documents for d in entry.domains) == entry.num_documents
        assert sum(d.num_tokens for d in entry.domains) == entry.num_tokens
        assert sum(d.num_bytes for d in entry.domains) == entry.num_bytes


def test_shards_are_raw_little_endian_numbers(folder: Path) -> None:
    split = open_split(folder, "train", verify=True)
    raw = (folder / "train-00000.tokens").read_bytes()
    assert len(raw) <= 3000
    assert raw[0] + 256 * raw[1] == split.tokens(0)[0]
    assert (np.frombuffer(raw, dtype="<u2") == split.shards[0]).all()
    assert [token_dtype(size) for size in (512, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


def test_a_pickled_split_is_a_path_and_not_its_tokens(folder: Path) -> None:
    split = open_split(folder, "train", verify=True)
    content = pickle.dumps(split)
    assert len(content) < 1000
    assert (pickle.loads(content).tokens(3) == split.tokens(3)).all()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_flipped_bit_is_found_in_any_file_that_is_read(folder: Path, split: str) -> None:
    other = {"train": "validation", "validation": "train"}[split]
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for place in (0, len(good) // 2, len(good) - 2):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(DataError, match=path.name):
                open_split(folder, other if path.name.startswith(other) else split, verify=True)
        path.write_bytes(good)
    open_split(folder, split, verify=True)


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "empty", "link", "folder"])
def test_a_damaged_file_is_named_even_without_hashing(folder: Path, damage: str) -> None:
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        path.unlink()
        if damage == "link":
            (folder.parent / "elsewhere").write_bytes(good)
            path.symlink_to(folder.parent / "elsewhere")
        elif damage == "folder":
            path.mkdir()
        elif damage != "missing":
            changed = {"truncated": good[:-2], "longer": good + b"x", "empty": b""}[damage]
            path.write_bytes(changed)
        with pytest.raises(DataError, match=path.name):
            open_split(folder, "train", verify=False)
        if damage == "folder":
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(good)
    open_split(folder, "train", verify=True)


def test_swapped_files_of_one_size_are_found(folder: Path) -> None:
    first, second = folder / "train-00000.tokens", folder / "other"
    first.rename(second)
    tokens = np.frombuffer(second.read_bytes(), dtype="<u2").copy()
    tokens[[5, 6]] = tokens[[6, 5]] + np.array([0, 1], dtype=np.uint16)
    first.write_bytes(tokens.tobytes())
    with pytest.raises(DataError, match=r"train-00000\.tokens.*SHA-256 differs"):
        open_split(folder, "train", verify=True)


def test_an_edited_manifest_is_found(folder: Path) -> None:
    edit_manifest(folder, lambda fields: fields.update(vocab_size=100_000), seal=False)
    with pytest.raises(DataError, match=r"manifest\.json: was changed"):
        open_split(folder, "train", verify=False)


def _rename_shard(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["splits"][0]["shards"][0].update(name=name)


@pytest.mark.parametrize(
    "name", ["../elsewhere", "/etc/hostname", "inner/file", "..", "", "a\\b", "manifest.json"]
)
def test_a_sealed_manifest_cannot_leave_its_folder(folder: Path, name: str) -> None:
    shutil.copy(folder / "train-00000.tokens", folder.parent / "elsewhere")
    edit_manifest(folder, _rename_shard(name), seal=True)
    with pytest.raises(DataError, match=r"manifest\.json: names the file .* not in its folder"):
        open_split(folder, "train", verify=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.update(dtype="float64"), "dtype is 'float64'"),
        (lambda f: f.update(dtype="uint32"), "tokens|does not agree"),
        (lambda f: f.update(format_version=2), "has format 2"),
        (lambda f: f.pop("domains"), "manifest"),
        (lambda f: f.update(surprise=1), "unknown key"),
        (lambda f: f.update(seed="x"), "seed: got 'x'"),
        (lambda f: f["splits"].pop(), "not consistent"),
        (lambda f: f["splits"][0].update(num_tokens=7), "does not agree"),
        (lambda f: f["splits"][0].update(num_documents=7), "does not agree"),
        (lambda f: f["splits"][0].update(num_bytes=7), "does not agree"),
        (lambda f: f["splits"][0]["shards"].reverse(), "does not agree"),
        (lambda f: f["splits"][0]["domains"].pop(), "does not agree"),
    ],
)
def test_a_sealed_but_wrong_manifest_is_found(
    folder: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    edit_manifest(folder, change, seal=True)
    with pytest.raises(DataError, match=reason):
        open_split(folder, "train", verify=False)


def test_a_table_that_points_outside_its_shard_is_found(folder: Path) -> None:
    path = folder / "train.documents.npy"
    table = np.load(path)
    table["offset"][3] += 10_000
    np.save(path, table)
    with pytest.raises(DataError, match=r"train\.documents\.npy: does not agree"):
        open_split(folder, "train", verify=False)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, "\udcff"])
def test_a_manifest_that_is_not_a_manifest_is_named(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_split(folder, "train", verify=False)


def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"python launch/prepare_data\.py paths\.data_dir=.*absent"):
        open_split(tmp_path / "absent", "train", verify=True)
    with pytest.raises(DataError, match=r"not a prepared data folder.*launch/prepare_data\.py"):
        open_split(tmp_path, "train", verify=True)


def test_an_unknown_split_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="split: got 'test'; allowed: train, validation"):
        open_split(folder, "test", verify=False)


def test_a_prepared_folder_may_itself_be_a_link(folder: Path, tmp_path: Path) -> None:
    os.symlink(folder, tmp_path / "link")
    assert open_split(tmp_path / "link", "train", verify=True).num_documents > 0


def test_the_fingerprint_is_about_tokens_and_not_about_places(original: Path, folder: Path) -> None:
    first, second = read_manifest(original, verify=True), read_manifest(folder, verify=True)
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
    assert len(first.fingerprint) == 64
