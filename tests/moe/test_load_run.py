"""A run is opened for its model alone, and takes no memory for a model that is not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import load_run as module
from moe.config import DataConfig, TrainConfig
from moe.errors import CheckpointError
from moe.load_run import load_run, open_run
from moe.model.transformer import build_model
from moe.model_config import ModelConfig
from moe.train.checkpoint import open_checkpoint, save_checkpoint

MODEL = ModelConfig(
    name="small", vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=8, intermediate_size=12, num_experts=4, top_k=2, max_position=32, attention_bias=False,
)  # fmt: skip
CPU = torch.device("cpu")


def save(root: Path, model: ModelConfig = MODEL) -> Path:
    """A checkpoint of MODEL's tensors and moments, whose config.json describes `model`."""
    config = TrainConfig(model=model, data=DataConfig(seq_len=32))
    tensors = dict(build_model(MODEL, config.router, seed=1).state_dict())
    return save_checkpoint(
        root / "checkpoints", 7,
        tensors={"model": tensors, "optimizer": {f"{n}.exp_avg": t for n, t in tensors.items()}},
        state={"train": {"precision": "float32"}},
        extra_files={"config.json": json.dumps(dataclasses.asdict(config)).encode()},
        keep_last=1,
    )  # fmt: skip


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_moments_are_neither_hashed_nor_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    damage(folder / "optimizer.safetensors")
    hashed: list[int] = []
    opened = open_run(str(tmp_path), on_skip=pytest.fail, progress=hashed.append)
    sizes = {file.name: file.size for file in opened.checkpoint.manifest.files}
    assert sum(hashed) == sum(sizes.values()) - sizes["optimizer.safetensors"]
    assert load_run(str(folder), device=CPU, on_skip=pytest.fail).model.config == MODEL
    with pytest.raises(CheckpointError, match=r"has no file 'optimizer\.safetensors'"):
        opened.checkpoint.file("optimizer.safetensors")
    with pytest.raises(ValueError, match="opened without optimizer"):
        opened.checkpoint.tensors("optimizer")
    with pytest.raises(CheckpointError, match="its SHA-256"):
        open_checkpoint(folder)


def test_a_damaged_model_is_refused_and_a_missing_file_of_any_kind_too(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        open_run(str(folder), on_skip=pytest.fail)
    folder = save(tmp_path)
    damage(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its SHA-256"):
        open_run(str(folder), on_skip=pytest.fail)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**12},
        {"num_layers": 10**9},
        {"intermediate_size": 10**7, "num_experts": 10**4},
    ],
)
def test_a_model_of_another_size_than_its_tensors_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    folder = save(tmp_path, dataclasses.replace(MODEL, **changes))
    monkeypatch.setattr(module, "build_model", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(
        CheckpointError, match=r"config\.json: describes a model of [\d,]{7,} param"
    ):
        load_run(str(folder), device=CPU, on_skip=pytest.fail)


def test_a_model_of_other_shapes_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, dataclasses.replace(MODEL, num_heads=1, num_kv_heads=1, head_dim=12))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("it has memory"))
    with pytest.raises(CheckpointError, match="its parameters are not this model's"):
        load_run(str(folder), device=CPU, on_skip=pytest.fail)
