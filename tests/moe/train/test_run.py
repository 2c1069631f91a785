"""A whole run in this process: what it tells the watch."""

from __future__ import annotations

import collections
import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moe.train.run as run_module
from moe.config import (
    DataConfig,
    LoggingConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PathsConfig,
    TrainConfig,
)  # fmt: skip
from moe.parallel.watch import Watch
from moe.parallel.watch_page import make_page
from moe.train.run import run

CONFIG = TrainConfig(
    model=ModelConfig(
        name="nano", vocab_size=512, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=8, intermediate_size=8, num_experts=4, top_k=2,
    ),
    data=DataConfig(seq_len=32),
    optim=OptimConfig(warmup_steps=1),
    parallel=ParallelConfig(engine="plain"),
    logging=LoggingConfig(wandb="disabled"),
    train=LoopConfig(
        steps=4, batch_size=4, micro_batch_size=4, evaluate_every=2, save_every=2,
        precision="float32", sample_prompt="the ", sample_tokens=4,
    ),
)  # fmt: skip


class CountingWatch(Watch):
    """How often each phase has said that it moves on."""

    def __init__(self) -> None:
        super().__init__(make_page())
        self.current = "starting"
        self.counts: collections.Counter[str] = collections.Counter()

    def phase(self, name: str, step: int | None = None) -> None:
        self.current = name

    def progress(self, amount: int = 1) -> None:
        self.counts[self.current] += 1


def test_every_phase_whose_length_the_user_chooses_says_that_it_moves_on(
    short_documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = CountingWatch()

    @contextlib.contextmanager
    def watch_over(*_: Any, **__: Any) -> Iterator[Watch]:
        yield watch

    monkeypatch.setattr(run_module, "watch_over", watch_over)
    data_dir = shutil.copytree(short_documents, tmp_path / "data")  # nobody has verified it
    paths = PathsConfig(data_dir=str(data_dir), run_dir=str(tmp_path / "run"))
    config = replace(CONFIG, paths=paths)
    run(config, say=lambda line: None)
    assert watch.counts.keys() >= {"verify data", "build model", "save", "evaluate", "write sample"}
    watch.counts.clear()
    run(config, say=lambda line: None)  # goes on from its last checkpoint
    assert watch.counts.keys() >= {"find checkpoint", "load parameters"}
    watch.counts.clear()
    started = replace(config.train, init_from=str(tmp_path / "run"))
    other = replace(paths, run_dir=str(tmp_path / "other"))
    run(replace(config, train=started, paths=other), say=lambda line: None)
    assert "load parameters" in watch.counts
