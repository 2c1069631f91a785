"""Every damage to a checkpoint of many ranks is found, with its file, before a tensor is used."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded_saves import random_tiling, save_as_ranks

from moe.errors import CheckpointError
from moe.train.checkpoint import find_checkpoint, open_checkpoint

NUM_RANKS = 4
SHARDS = tuple(
    f"{stem}-{number:05d}-of-{NUM_RANKS:05d}.safetensors"
    for stem in ("model", "optimizer")
    for number in range(1, NUM_RANKS + 1)
)
FILES = (*SHARDS, "state.json", "config.json", "manifest.json")


def content(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    model = {
        "embed": torch.randn(16, 9, generator=generator),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "step": torch.tensor(step),
    }
    moments = {f"{name}.exp_avg": value.float() * 2 for name, value in model.items()}
    return {"model": model, "optimizer": moments}


def save(root: Path, step: int) -> Path:
    """The same layout at each step, as in a run: every rank has some of each stem."""
    generator = random.Random(0)
    ranks: list[dict[str, list[Any]]] = [{} for _ in range(NUM_RANKS)]
    for stem, tensors in content(step).items():
        while True:
            tiling = random_tiling(tensors, NUM_RANKS, generator, num_cuts=8)
            if all(tiling):
                break
        for rank, held in zip(ranks, tiling, strict=True):
            rank[stem] = held
    root.mkdir(exist_ok=True)
    extra = {"config.json": json.dumps({"step": step}).encode()}
    return save_as_ranks(root, step, ranks, state={"step": step}, extra_files=extra)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "c"
    save(root, 100)
    save(root, 200)
    return root


def check_found(root: Path, step: int) -> list[str]:
    """The checkpoint of this step is found, holding bitwise what was saved; what was skipped."""
    skipped: list[str] = []
    checkpoint = find_checkpoint(root, on_skip=skipped.append)
    assert checkpoint is not None
    assert checkpoint.step == checkpoint.state["step"] == step
    for stem, tensors in content(step).items():
        loaded = checkpoint.tensors(stem)
        assert set(loaded) == set(tensors)
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    return skipped


def refused(folder: Path, names: str | tuple[str, ...], reason: str = "") -> str:
    """Opening is refused with the name of a damaged file, and the step before is used instead."""
    named = (names,) if isinstance(names, str) else names
    skipped = check_found(folder.parent, 100)
    assert len(skipped) == 1
    assert skipped[0].startswith(tuple(f"{folder}: {name}: " for name in named)), skipped[0]
    assert reason in skipped[0], skipped[0]
    assert "Restore the file from a copy, or delete this folder" in skipped[0]
    return skipped[0]


def test_what_was_saved_is_found_where_nothing_is_damaged(root: Path) -> None:
    assert check_found(root, 200) == []
    names = {path.name for path in (root / "step_00000200").iterdir()}
    assert names == set(FILES)


def flip(folder: Path, generator: random.Random) -> tuple[str, ...]:
    name = generator.choice(FILES)
    bad = bytearray((folder / name).read_bytes())
    bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
    (folder / name).write_bytes(bad)
    return (name,)


def truncate(folder: Path, generator: random.Random) -> tuple[str, ...]:
    name = generator.choice(FILES)
    os.truncate(folder / name, generator.randrange((folder / name).stat().st_size))
    return (name,)


def lengthen(folder: Path, generator: random.Random) -> tuple[str, ...]:
    name = generator.choice(FILES)
    with (folder / name).open("ab") as file:
        file.write(generator.randbytes(generator.randint(1, 600)))
    return (name,)


def zero_a_block(folder: Path, generator: random.Random) -> tuple[str, ...]:
    name = generator.choice(FILES)
    good = (folder / name).read_bytes()
    start = generator.randrange(0, len(good), 512)
    length = len(good[start : start + 512])
    (folder / name).write_bytes(good[:start] + bytes(length) + good[start + length :])
    return (name,)


def remove(folder: Path, generator: random.Random) -> tuple[str, ...]:
    name = generator.choice(FILES)
    (folder / name).unlink()
    return (name,)


def add(folder: Path, generator: random.Random) -> tuple[str, ...]:
    """A shard of another layout lies about: of five ranks, a fifth one, or a whole file."""
    new = generator.choice(
        ["model-00005-of-00004.safetensors", "model-00001-of-00005.safetensors",
         "model.safetensors", "optimizer.safetensors", "model-1.safetensors"]
    )  # fmt: skip
    shutil.copy(folder / generator.choice(SHARDS), folder / new)
    return (new,)


def swap(folder: Path, generator: random.Random) -> tuple[str, ...]:
    a, b = generator.sample(SHARDS, 2)
    os.rename(folder / a, folder / "kept")
    os.rename(folder / b, folder / a)
    os.rename(folder / "kept", folder / b)
    return a, b


def make_stale(folder: Path, generator: random.Random) -> tuple[str, ...]:
    """A rank's file, or any other, is the one of the step before."""
    name = generator.choice(FILES)
    shutil.copy(folder.parent / "step_00000100" / name, folder / name)
    return (name,)


def take_a_neighbours(folder: Path, generator: random.Random) -> tuple[str, ...]:
    a, b = generator.sample(SHARDS, 2)
    shutil.copy(folder / a, folder / b)
    return (b,)


DAMAGES = (
    flip, flip, flip, truncate, lengthen, zero_a_block, remove, add, swap, make_stale,
    take_a_neighbours,
)  # fmt: skip


def damage_many_times(root: Path, num_times: int, *, seed: int) -> None:
    generator = random.Random(seed)
    folder = root / "step_00000200"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    done: dict[str, int] = {}
    for number in range(num_times):
        damage = DAMAGES[number % len(DAMAGES)]
        names = damage(folder, generator)
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert after != whole
        refused(folder, names)
        done[damage.__name__] = done.get(damage.__name__, 0) + 1
        for path in folder.iterdir():
            path.unlink()
        for name, raw in whole.items():
            (folder / name).write_bytes(raw)
    assert check_found(root, 200) == []
    assert len(done) == 9
    assert sum(done.values()) == num_times


def test_200_random_damages_are_all_found_and_the_step_before_is_used(root: Path) -> None:
    damage_many_times(root, 200, seed=1)


@pytest.mark.long
def test_2000_random_damages_are_all_found_and_the_step_before_is_used(root: Path) -> None:
    damage_many_times(root, 2000, seed=2)


def rewrite_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest as a program with a bug would, that gives it a true hash."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    edit(manifest)
    manifest.pop("content_sha256", None)
    compact = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    manifest["content_sha256"] = hashlib.sha256(compact).hexdigest()
    text = json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"
    (folder / "manifest.json").write_bytes(text)


def replace_with_valid_hash(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file({key: values.clone() for key, values in tensors.items()}, folder / name)
    raw = (folder / name).read_bytes()
    entry = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def place_of(folder: Path, name: str, element: int) -> tuple[str, str]:
    """The file and the key that hold an element of a tensor."""
    for file in SHARDS:
        with safe_open(folder / file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                match = re.fullmatch(rf"{re.escape(name)}\[(\d+):(\d+)\]", key)
                if match and int(match[1]) <= element < int(match[2]):
                    return file, key
    raise AssertionError(f"{name}[{element}] is nowhere")


def shorten(key: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    start, end = map(int, re.findall(r"\d+", key)[-2:])
    return {f"{key.rsplit('[', 1)[0]}[{start}:{end - 1}]": values[:-1]}


def lower(key: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    start, end = map(int, re.findall(r"\d+", key)[-2:])
    name = key.rsplit("[", 1)[0]
    return {f"{name}[{start - 1}:{end}]": torch.cat([values[:1], values])}


def shift(key: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    start, end = map(int, re.findall(r"\d+", key)[-2:])
    return {f"{key.rsplit('[', 1)[0]}[{start + 1000}:{end + 1000}]": values}


TILINGS: dict[str, tuple[Callable[[str, torch.Tensor], dict[str, torch.Tensor]], str]] = {
    "missing": (lambda key, values: {}, "nothing holds"),
    "gap": (shorten, "nothing holds those from"),
    "overlap": (lower, "has them up to"),
    "past the end": (shift, "the manifest's table has 'embed'"),
    "another type": (lambda key, values: {key: values.double()}, "is F64 of shape"),
    "another shape": (lambda key, values: {key: values.view(-1, 1)}, "of shape"),
    "longer than its key": (lambda key, values: {key: torch.cat([values, values])}, "of shape"),
    "unknown name": (
        lambda key, values: {key: values, "embedd": values},
        "'embedd', which the manifest's table does not have",
    ),
    "unknown range": (
        lambda key, values: {key: values, "x[0:1]": values[:1]},
        "'x[0:1]', which the manifest's table does not have",
    ),
    "odd spelling": (lambda key, values: {key.replace("[", "[0"): values}, "does not have"),
    "whole beside its ranges": (
        lambda key, values: {key: values, "embed": torch.zeros(16, 9)},
        "has them up to",
    ),
    "empty range": (lambda key, values: {key: values, "embed[3:3]": values[:0]}, "of shape [0]"),
}


@pytest.mark.parametrize(("change", "reason"), TILINGS.values(), ids=TILINGS.keys())
def test_true_hashes_of_shards_that_do_not_make_up_a_tensor_do_not_help(
    newest: Path, change, reason: str
) -> None:
    file, key = place_of(newest, "embed", 70)
    assert "embed[0:" not in key
    assert ":144]" not in key
    tensors = load_file(newest / file)
    new = change(key, tensors.pop(key))
    replace_with_valid_hash(newest, file, tensors | new)
    refused(newest, SHARDS[:NUM_RANKS], reason)


def test_a_missing_last_or_first_range_is_found(newest: Path) -> None:
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    for element, reason in ((0, "begins with element"), (143, "and nothing holds the rest")):
        file, key = place_of(newest, "embed", element)
        tensors = load_file(newest / file)
        tensors.pop(key)
        replace_with_valid_hash(newest, file, tensors)
        refused(newest, SHARDS[:NUM_RANKS], reason)
        for name, raw in whole.items():
            (newest / name).write_bytes(raw)


def test_a_tensor_in_two_shards_is_found(newest: Path) -> None:
    for file in SHARDS[:NUM_RANKS]:
        tensors = load_file(newest / file)
        if "step" in tensors:
            continue
        replace_with_valid_hash(newest, file, tensors | {"step": torch.tensor(7)})
        refused(newest, SHARDS[:NUM_RANKS], "'step' has elements 0 to 1")
        return


FILE_LISTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "one shard less": lambda files: files.pop("model-00002-of-00004.safetensors"),
    "the last one less": lambda files: files.pop("model-00004-of-00004.safetensors"),
    "one too many": lambda files: files.update(
        {"model-00005-of-00004.safetensors": files["model-00001-of-00004.safetensors"]}
    ),
    "number nought": lambda files: files.update(
        {"model-00000-of-00004.safetensors": files.pop("model-00001-of-00004.safetensors")}
    ),
    "another count": lambda files: files.update(
        {"model-00002-of-00003.safetensors": files.pop("model-00002-of-00004.safetensors")}
    ),
    "a whole file too": lambda files: files.update(
        {"model.safetensors": files["model-00001-of-00004.safetensors"]}
    ),
    "another stem": lambda files: files.update(
        {"other-00001-of-00001.safetensors": files["model-00001-of-00004.safetensors"]}
    ),
}


@pytest.mark.parametrize("edit", FILE_LISTS.values(), ids=FILE_LISTS.keys())
def test_a_list_of_shards_that_is_not_as_their_names_say_is_refused(newest: Path, edit) -> None:
    rewrite_manifest(newest, lambda manifest: edit(manifest["files"]))
    refused(newest, "manifest.json", "it lists")


def test_a_shard_changed_after_it_was_verified_is_refused(newest: Path) -> None:
    checkpoint = open_checkpoint(newest)
    file, key = place_of(newest, "embed", 70)
    start = int(re.findall(r"\d+", key)[-2])
    bad = bytearray((newest / file).read_bytes())
    bad[-1] ^= 1
    (newest / file).write_bytes(bad)
    os.utime(newest / file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=f"{file}: it was changed by another program"):
        checkpoint.read_range("model", "embed", start, torch.empty(1))
    with pytest.raises(CheckpointError, match=f"{file}: it was changed by another program"):
        checkpoint.hashes("model")
    with pytest.raises(CheckpointError, match=f"{file}: it was changed by another program"):
        checkpoint.tensors("model")
