"""Import then export gives back every published tensor, byte for byte; transformers opens it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from published_folders import CONFIGS, SHAPES, random_tensors, read_folder, write_folder

from moe.convert.export_model import Exported, export_model
from moe.convert.import_model import Imported, import_model
from moe.load_run import LoadedRun, load_run, open_run

NATIVE = [name for name in CONFIGS if name != "phi3small"]


def quiet(*_: object) -> None:
    pass


def published(folder: Path, name: str, *, dtype: str = "F32", num_shards: int = 1, **more) -> Path:
    config = {**CONFIGS[name], **more}
    tensors = random_tensors(SHAPES[config["model_type"]](config), dtype=dtype)
    return write_folder(folder, config, tensors, num_shards=num_shards)


def into_ours(source: Path, target: Path, *, window: str = "original") -> Imported:
    return import_model(source, target, window=window, tokenizer=None, on_progress=quiet)


def into_theirs(
    source: Path, target: Path, *, window: str | None = None, shard: int = 10**9
) -> Exported:
    opened = open_run(str(source), on_skip=pytest.fail)
    return export_model(opened, target, window=window, max_shard_bytes=shard, on_progress=quiet)


def load(folder: Path) -> LoadedRun:
    return load_run(str(folder), device=torch.device("cpu"), on_skip=pytest.fail)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_comes_back_byte_for_byte(tmp_path, name, dtype, num_shards):
    source = published(tmp_path / "hf", name, dtype=dtype, num_shards=num_shards)
    done = into_ours(source, tmp_path / "ours")
    into_theirs(tmp_path / "ours", tmp_path / "back", shard=10**9 if num_shards == 1 else 9000)
    before, after = read_folder(source), read_folder(tmp_path / "back")
    assert after == before
    assert done.num_bytes == sum(len(content) for _, _, content in before.values())
    wanted = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    assert {p.dtype for p in load(tmp_path / "ours").model.parameters()} == {wanted}


@pytest.mark.parametrize("name", NATIVE)
def test_transformers_opens_what_is_exported_and_agrees(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    into_ours(published(tmp_path / "hf", name), tmp_path / "ours", window="transformers")
    into_theirs(tmp_path / "ours", tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype="auto", attn_implementation="eager"
    ).eval()
    ours = load(tmp_path / "ours").model
    tokens = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens).logits
    assert expected.std() > 0.2
    assert (expected - got).abs().max() < 1e-5 * expected.abs().max()


def test_memory_names_of_transformers_5_are_read_too(tmp_path):
    """What holds the state_dict of a loaded model, experts fused, is the same model."""
    source = published(tmp_path / "hf", "phimoe")
    tensors = {
        key: np.frombuffer(content, np.float32).reshape(shape)
        for key, (_, shape, content) in read_folder(source).items()
    }
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        tensors[f"{new}.router.weight"] = tensors.pop(f"{old}.gate.weight")
        w1, w2, w3 = (
            [tensors.pop(f"{old}.experts.{e}.{name}.weight") for e in range(4)]
            for name in ("w1", "w2", "w3")
        )
        pairs = zip(w1, w3, strict=True)
        tensors[f"{new}.experts.gate_up_proj"] = np.stack([np.concatenate(p) for p in pairs])
        tensors[f"{new}.experts.down_proj"] = np.stack(w2)
    fused = write_folder(tmp_path / "fused", CONFIGS["phimoe"], tensors, num_shards=2)
    into_ours(source, tmp_path / "a")
    into_ours(fused, tmp_path / "b")
    assert read_folder(tmp_path / "a") == read_folder(tmp_path / "b")
    into_theirs(tmp_path / "b", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(source)


def test_shards_hold_at_most_their_bytes_and_the_index_says_where_all_is(tmp_path):
    into_ours(published(tmp_path / "hf", "phimoe"), tmp_path / "ours")
    done = into_theirs(tmp_path / "ours", tmp_path / "back", shard=30_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(names) == done.num_shards > 3
    assert set(index["weight_map"].values()) == set(names)
    tensors = read_folder(tmp_path / "back")
    assert index["weight_map"].keys() == tensors.keys()
    sizes = dict.fromkeys(names, 0)
    for key, name in index["weight_map"].items():
        sizes[name] += len(tensors[key][2])
    assert max(sizes.values()) <= 30_000
    assert index["metadata"]["total_size"] == sum(sizes.values()) == done.num_bytes
    header = (tmp_path / "back" / names[0]).read_bytes()[8:80]
    assert b'"__metadata__":{"format":"pt"}' in header


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    into_ours(published(tmp_path / "hf", "phi3 mha"), tmp_path / "ours")
    done = into_theirs(tmp_path / "ours", tmp_path / "back", shard=1)
    assert done.num_shards == len(read_folder(tmp_path / "back"))


def test_the_published_files_come_back_byte_for_byte(tmp_path):
    source = published(tmp_path / "hf", "phimoe")
    given = {
        "generation_config.json": '{"eos_token_id": [2, 3],  "odd spacing": 1}',
        "tokenizer.json": "{ }", "tokenizer_config.json": '{"a":\t1}',
        "special_tokens_map.json": "{}", "added_tokens.json": "{}\n",
    }  # fmt: skip
    for name, text in given.items():
        (source / name).write_text(text)
    into_ours(source, tmp_path / "ours")
    into_theirs(tmp_path / "ours", tmp_path / "back")
    for name in (*given, "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


def test_remote_code_is_taken_out_of_the_configuration(tmp_path):
    source = published(
        tmp_path / "hf", "phimoe", auto_map={"AutoModelForCausalLM": "modeling_phimoe.X"}
    )
    into_ours(source, tmp_path / "ours")
    into_theirs(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == CONFIGS["phimoe"]


def test_the_class_name_that_transformers_writes_becomes_the_published_one(tmp_path):
    source = published(tmp_path / "hf", "phimoe", architectures=["PhimoeForCausalLM"])
    into_ours(source, tmp_path / "ours")
    into_theirs(tmp_path / "ours", tmp_path / "back")
    given, back = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")
    )
    assert back == given | {"architectures": ["PhiMoEForCausalLM"]}


def test_grin_is_exported_as_the_class_that_transformers_has(tmp_path):
    into_ours(published(tmp_path / "hf", "grin"), tmp_path / "ours")
    into_theirs(tmp_path / "ours", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["model_type"] == "phimoe"
    assert config["sliding_window"] == 7


@pytest.mark.parametrize(
    ("imported", "ours", "exported", "back"),
    [
        ("original", 8, None, 7), ("transformers", 7, None, 7), ("original", 8, "original", 7),
        ("original", 8, "transformers", 8), ("transformers", 7, "original", 6),
    ],
)  # fmt: skip
def test_the_window_is_counted_as_asked_for(tmp_path, imported, ours, exported, back):
    source = published(tmp_path / "hf", "phi3 gqa window")
    into_ours(source, tmp_path / "ours", window=imported)
    assert load(tmp_path / "ours").config.model.sliding_window == ours
    into_theirs(tmp_path / "ours", tmp_path / "back", window=exported)
    assert json.loads((tmp_path / "back/config.json").read_text())["sliding_window"] == back
    assert f"a query sees {ours} keys" in (tmp_path / "back/README.md").read_text()


def test_a_stored_tied_head_comes_back_and_a_stored_rotary_buffer_does_not(tmp_path):
    config = CONFIGS["phi3small"]
    tensors = random_tensors(SHAPES["phi3small"](config))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    kept = dict(tensors)
    for layer in range(2):
        key = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[key] = np.ones(4, np.float32)
    source = write_folder(tmp_path / "hf", config, tensors)
    done = into_ours(source, tmp_path / "ours")
    assert len(done.skipped) == 2
    assert "head.weight" not in read_folder(tmp_path / "ours")
    into_theirs(tmp_path / "ours", tmp_path / "back")
    expected = {key: value.tobytes() for key, value in kept.items()}
    assert {key: value[2] for key, value in read_folder(tmp_path / "back").items()} == expected


def test_norms_of_another_type_keep_it_and_the_model_is_built_in_the_wider_one(tmp_path):
    config = CONFIGS["phi3 gqa window"]
    tensors = random_tensors(SHAPES["phi3"](config), dtype="BF16")
    wide = random_tensors(SHAPES["phi3"](config))
    tensors |= {key: wide[key] for key in tensors if "norm" in key}
    source = write_folder(tmp_path / "hf", config, tensors)
    into_ours(source, tmp_path / "ours")
    into_theirs(tmp_path / "ours", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(source)
    run = load(tmp_path / "ours")
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.precision == torch.float32
    embedding = (tensors["model.embed_tokens.weight"].astype(np.uint32) << 16).view(np.float32)
    assert torch.equal(run.model.embed.weight, torch.from_numpy(embedding))


def test_a_converted_model_is_a_checkpoint_whose_every_byte_is_verified(tmp_path):
    into_ours(published(tmp_path / "hf", "phimoe", dtype="BF16"), tmp_path / "ours")
    run = load(tmp_path / "ours")
    assert run.tokenizer is None
    assert run.precision == torch.bfloat16
    assert run.config.data.seq_len <= run.config.model.usable_length
    assert run.checkpoint.state["origin"]["family"] == "phimoe"
    assert run.checkpoint.state["train"]["run_id"] == "converted"
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {"manifest.json", "state.json", "config.json", "hf_config.json"} <= names
    path = tmp_path / "ours" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    from moe.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"model\.safetensors: its SHA-256"):
        load(tmp_path / "ours")


def test_a_conversion_of_the_same_folder_is_the_same_file(tmp_path):
    source = published(tmp_path / "hf", "phi3small", num_shards=3)
    for name in ("a", "b"):
        into_ours(source, tmp_path / name)
    same = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b")]
    assert same[0] == same[1]
    assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "b"))
