"""A checkpoint of many ranks' shards is exported as the same weights in one file are."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
import yaml
from measure_memory import convert, moe_config, tensor_hashes, write_synthetic
from published_folders import SHAPES, random_tensors, write_folder

from moe.config import RouterConfig
from moe.config_from_dict import from_dict
from moe.convert import tensor_stream
from moe.convert.export_model import export_model
from moe.convert.hf_config import to_hf_config
from moe.convert.import_model import import_model
from moe.errors import CheckpointError
from moe.load_run import open_run
from moe.model_config import ModelConfig
from moe.train.checkpoint import open_checkpoint

TESTS = Path(__file__).parents[2]
sys.path.insert(0, str(TESTS / "moe/train"))
from sharded_saves import random_tiling, save_as_ranks  # noqa: E402 - found through the line above


def quiet(*_: object) -> None:
    pass


def ours(folder: Path) -> Path:
    """A converted model, its weights in one file."""
    raw = (TESTS.parent / "conf/model/phi35_moe_tiny.yaml").read_text()
    model = from_dict(ModelConfig, yaml.safe_load(raw))
    values = to_hf_config(model, RouterConfig(), dtype="float32", window="transformers")
    values |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    source = write_folder(
        folder / "hf", values, random_tensors(SHAPES[values["model_type"]](values)), num_shards=1
    )
    import_model(source, folder / "ours", window="transformers", tokenizer=None, on_progress=quiet)
    return folder / "ours"


def sharded(one: Path, root: Path, num_ranks: int) -> Path:
    """The same checkpoint as several ranks would save it, cut at random places."""
    checkpoint = open_checkpoint(one)
    pieces = random_tiling(
        checkpoint.tensors("model"), num_ranks, random.Random(num_ranks), num_cuts=5
    )
    extra = {
        name: checkpoint.file(name).read_bytes()
        for name in checkpoint.verified
        if name != "state.json" and not name.endswith(".safetensors")
    }
    root.mkdir()
    return save_as_ranks(
        root, 0, [{"model": held} for held in pieces], state=checkpoint.state, extra_files=extra
    )


def export(run: Path, target: Path) -> dict[str, bytes]:
    export_model(
        open_run(str(run), on_skip=pytest.fail), target, window=None, max_shard_bytes=100_000,
        on_progress=quiet,
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.mark.parametrize(("num_ranks", "chunk", "most_open"), [(2, 2**20, 100), (4, 4096, 2)])
def test_shards_are_exported_byte_for_byte_as_one_file_is(
    tmp_path, monkeypatch, num_ranks, chunk, most_open
):
    one = ours(tmp_path)
    expected = export(one, tmp_path / "from_one")
    many = sharded(one, tmp_path / "many", num_ranks)
    assert len(list(many.glob("model-*.safetensors"))) == num_ranks
    monkeypatch.setattr(tensor_stream, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(tensor_stream, "_MOST_OPEN", most_open)
    exported = export(many, tmp_path / "from_many")
    exported.pop("README.md"), expected.pop("README.md")  # it names the checkpoint
    assert len(expected) > 3
    assert exported == expected


def test_a_shard_that_changes_before_it_is_read_ends_the_export(tmp_path):
    many = sharded(ours(tmp_path), tmp_path / "many", 2)
    opened = open_run(str(many), on_skip=pytest.fail)
    path = many / "model-00002-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*changed by another program"):
        export_model(
            opened, tmp_path / "back", window=None, max_shard_bytes=10**9, on_progress=quiet
        )
    assert not (tmp_path / "back").exists()


@pytest.mark.slow
def test_an_export_from_shards_takes_no_more_memory_than_from_one_file(fast_folder):
    config = moe_config(layers=4, width=512, inner=1600, experts=8, vocabulary=512)
    assert write_synthetic(fast_folder / "hf", config, shard_bytes=2**30) > 150 * 2**20
    convert(fast_folder / "hf", fast_folder / "ours")
    many = sharded(fast_folder / "ours", fast_folder / "many", 4)
    _, peak_of_one = convert(fast_folder / "ours", fast_folder / "back")
    _, peak_of_many = convert(many, fast_folder / "back_of_many")
    hashes = [tensor_hashes(fast_folder / name) for name in ("hf", "back", "back_of_many")]
    assert hashes[0] == hashes[1] == hashes[2]
    assert peak_of_many - peak_of_one < 30 * 2**20  # of 150 MiB of tensors
