"""Which checkpoints of a run are still there: the last, every N-th, the best; over resumes, too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moe.config import (
    DataConfig,
    LoggingConfig,
    LoopConfig,
    OptimConfig,
    ParallelConfig,
    PathsConfig,
    TrainConfig,
)
from moe.errors import CheckpointError, ConfigError
from moe.model_config import ModelConfig
from moe.train import checkpoint_files
from moe.train import run as run_module
from moe.train.checkpoint import open_checkpoint, save_checkpoint
from moe.train.checkpoint_files import list_checkpoints, remove_old
from moe.train.run import run

MODEL = ModelConfig(
    vocab_size=512, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    intermediate_size=8, num_experts=2, max_position=64,
)  # fmt: skip


def config_of(data: Path, run_dir: Path, **loop: Any) -> TrainConfig:
    return TrainConfig(
        model=MODEL, data=DataConfig(seq_len=64), optim=OptimConfig(warmup_steps=0),
        parallel=ParallelConfig(engine="plain"), logging=LoggingConfig(wandb="disabled"),
        train=LoopConfig(
            batch_size=1, micro_batch_size=1, precision="float32", sample_tokens=0,
            **{"save_every": 1, "evaluate_every": 1, "keep_last": 1, **loop},
        ),
        paths=PathsConfig(data_dir=str(data), run_dir=str(run_dir)),
    )  # fmt: skip


def steps(run_dir: Path) -> list[int]:
    return sorted(step for step, _ in list_checkpoints(run_dir / "checkpoints"))


def quiet(_: str) -> None:
    pass


def evaluations(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """The next validations of a run find these losses."""
    left = iter(losses)
    monkeypatch.setattr(run_module, "evaluate", lambda *_, **__: {"validation/loss": next(left)})


def test_the_best_stays_beside_the_last_also_after_a_resume(
    short_documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(short_documents, tmp_path, steps=4, keep_best=True)
    evaluations(monkeypatch, 5.0, 3.0, float("nan"), 4.0)
    run(config, say=quiet)
    assert steps(tmp_path) == [2, 4]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6))
    evaluations(monkeypatch, 3.5, 3.25)
    run(longer, say=quiet)
    assert steps(tmp_path) == [2, 6]
    state = open_checkpoint(tmp_path / "checkpoints" / "step_00000006").state["train"]
    assert (state["best_step"], state["best_loss"]) == (2, 3.0)
    longest = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
    evaluations(monkeypatch, 2.5, 2.75)
    run(longest, say=quiet)
    assert steps(tmp_path) == [7, 8]


def test_only_a_validation_of_its_own_step_makes_a_checkpoint_the_best(
    short_documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations(monkeypatch, 1.0, 5.0, 2.0, 6.0)  # of steps 1 to 4; 2 and 4 are saved
    run(config_of(short_documents, tmp_path, steps=4, save_every=2, keep_best=True), say=quiet)
    assert steps(tmp_path) == [2, 4]


def test_every_nth_stays_and_the_last_ones_do(
    short_documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations(monkeypatch, *[1.0] * 8)
    run(config_of(short_documents, tmp_path, steps=8, keep_every=3, keep_last=2), say=quiet)
    assert steps(tmp_path) == [3, 6, 7, 8]


def test_nothing_is_removed_before_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors={}, state={}, keep_last=1)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_new_file", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, 3, tensors={}, state={}, keep_last=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


def test_rules_add_up_and_later_steps_are_left(tmp_path: Path) -> None:
    for step in range(1, 11):
        (tmp_path / f"step_{step:08d}").mkdir()
    remove_old(tmp_path, 9, keep_last=2, keep_every=4, best_step=3)
    assert sorted(step for step, _ in list_checkpoints(tmp_path)) == [3, 4, 8, 9, 10]


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({"keep_every": 3, "save_every": 2}, r"keep_every: got 3.*save_every=2.*multiple"),
        ({"keep_every": 3, "save_every": 0}, r"keep_every: got 3.*save_every=0"),
        ({"keep_every": -1}, r"train\.keep_every: got -1"),
        ({"keep_best": True, "evaluate_every": 0}, r"keep_best: got true.*evaluate_every=0"),
        ({"keep_best": True, "save_every": 3, "evaluate_every": 2}, r"one a multiple of the other"),
    ],
)
def test_rules_that_keep_nothing_are_refused(loop: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**loop)
