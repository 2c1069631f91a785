"""train.init_from: the first step stands on another model's weights, and only the first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import (
    DataConfig,
    LoggingConfig,
    LoopConfig,
    OptimConfig,
    ParallelConfig,
    PathsConfig,
    TrainConfig,
)
from moe.convert.export_model import export_model
from moe.convert.import_model import import_model
from moe.errors import CheckpointError, ConfigError
from moe.load_run import load_run, open_run
from moe.model import init
from moe.model_config import ModelConfig
from moe.train.run import run

MODEL = ModelConfig(
    vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=16, num_experts=4, max_position=64,
)  # fmt: skip


def config_of(data: Path, run_dir: Path, *, model: ModelConfig = MODEL, **loop: Any) -> TrainConfig:
    steps = loop.pop("steps", 2)
    return TrainConfig(
        seed=loop.pop("seed", 0), model=model, data=DataConfig(seq_len=64),
        optim=OptimConfig(warmup_steps=0, lr=loop.pop("lr", 1e-3)),
        parallel=ParallelConfig(engine="plain"), logging=LoggingConfig(wandb="disabled"),
        train=LoopConfig(
            steps=steps, batch_size=2, micro_batch_size=2, precision="float32", evaluate_every=0,
            evaluate_tokens=2000, save_every=0, sample_tokens=0, **loop,
        ),
        paths=PathsConfig(data_dir=str(data), run_dir=str(run_dir)),
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load_run(str(folder), device=torch.device("cpu"), on_skip=pytest.fail)
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def trained(short_documents, tmp_path_factory) -> Path:
    """A run of a few large steps, far from where another seed starts."""
    folder = tmp_path_factory.mktemp("init_from") / "a"
    run(config_of(short_documents, folder, steps=4, lr=1e-2), say=quiet)
    return folder


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory) -> Path:
    """The same as a converted model, out to a published folder and back."""
    folder = tmp_path_factory.mktemp("converted")
    export_model(
        open_run(str(trained), on_skip=pytest.fail), folder / "hf", window=None,
        max_shard_bytes=20_000, on_progress=quiet,
    )  # fmt: skip
    import_model(
        folder / "hf", folder / "ours", window="original", tokenizer=None, on_progress=quiet
    )
    return folder / "ours"


@pytest.mark.parametrize("source", ["trained", "converted"])
def test_a_run_starts_from_the_weights_it_is_given(source, request, short_documents, tmp_path):
    folder: Path = request.getfixturevalue(source)
    model = load_run(str(folder), device=torch.device("cpu"), on_skip=pytest.fail).config.model
    said: list[str] = []
    # a step so small that no weight changes: what is saved is what the run started from
    config = config_of(
        short_documents, tmp_path / "b", model=model, init_from=str(folder), steps=1, seed=7,
        lr=1e-30,
    )  # fmt: skip
    run(config, say=said.append)
    expected = weights(folder)
    got = weights(tmp_path / "b")
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name
    assert any(line.startswith("weights: from ") for line in said)
    assert not any("tokenizer" in line for line in said)
    assert f'"init_from": "{folder}"' in (tmp_path / "b" / "config.json").read_text()


def test_without_it_a_run_starts_elsewhere(trained, short_documents, tmp_path):
    run(config_of(short_documents, tmp_path / "b", steps=1, seed=7, lr=1e-30), say=quiet)
    expected = weights(trained)
    assert not any(torch.equal(w, expected[n]) for n, w in weights(tmp_path / "b").items()
                   if w.ndim > 1)  # fmt: skip


def test_a_resumed_run_goes_on_from_its_own_weights(
    trained, short_documents, tmp_path, monkeypatch
):
    monkeypatch.setattr(init, "_draw", lambda label, size: pytest.fail(f"drew {label}"))
    source = tmp_path / "source"
    import shutil

    shutil.copytree(trained, source)
    config = config_of(short_documents, tmp_path / "b", init_from=str(source), steps=2)
    run(config, say=quiet)
    shutil.rmtree(source)  # not read again: it may be gone
    said: list[str] = []
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    run(longer, say=said.append)
    assert any(line.startswith("resume: ") for line in said)
    assert not any(line.startswith("weights: from ") for line in said)


def test_another_shape_is_refused_with_the_keys_that_differ(trained, short_documents, tmp_path):
    other = dataclasses.replace(MODEL, num_experts=2, intermediate_size=8)
    config = config_of(short_documents, tmp_path / "b", model=other, init_from=str(trained))
    with pytest.raises(CheckpointError) as caught:
        run(config, say=quiet)
    for text in ("train.init_from: ", "model.num_experts: it has 4, this run asks for 2",
                 "model.intermediate_size: it has 16"):  # fmt: skip
        assert text in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_what_differs_without_a_shape_is_said(trained, short_documents, tmp_path):
    other = dataclasses.replace(MODEL, sliding_window=16)
    said: list[str] = []
    run(
        config_of(short_documents, tmp_path / "b", model=other, init_from=str(trained), steps=1),
        say=said.append,
    )
    assert "note: model.sliding_window: it has None, this run asks for 16" in said


def test_weights_that_came_without_a_tokenizer_are_noted(trained, short_documents, tmp_path):
    export_model(
        open_run(str(trained), on_skip=pytest.fail), tmp_path / "hf", window=None,
        max_shard_bytes=10**9, on_progress=quiet,
    )  # fmt: skip
    for path in (*(tmp_path / "hf").glob("tokenizer*"), tmp_path / "hf/added_tokens.json"):
        path.unlink()
    import_model(
        tmp_path / "hf", tmp_path / "ours", window="original", tokenizer=None, on_progress=quiet
    )
    model = open_run(str(tmp_path / "ours"), on_skip=pytest.fail).config.model
    said: list[str] = []
    config = config_of(
        short_documents, tmp_path / "b", model=model, init_from=str(tmp_path / "ours"), steps=1
    )
    run(config, say=said.append)
    assert any("came without a tokenizer" in line for line in said)


def test_a_folder_that_is_no_model_is_named_with_the_key(short_documents, tmp_path):
    config = config_of(short_documents, tmp_path / "b", init_from=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"^train\.init_from: .* does not exist"):
        run(config, say=quiet)
    with pytest.raises(ConfigError, match=r"^train\.init_from: got an empty text"):
        config_of(short_documents, tmp_path / "b", init_from="")
