"""What tests of traces share: a checkpoint of a random model, and a trace of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe.config import DataConfig, PathsConfig, TokenizerConfig, TrainConfig
from moe.data.shards import TokenSplit, open_split
from moe.load_run import LoadedRun, load_run
from moe.model.transformer import build_model
from moe.model_config import ModelConfig, RopeConfig
from moe.trace.corpus import Traced, trace_corpus
from moe.trace.read import Trace, open_trace
from moe.trace_config import TraceConfig
from moe.train.checkpoint import save_checkpoint

# importlib mode puts no folder of tests on the path
sys.path.insert(0, str(Path(__file__).parent))

NANO = ModelConfig(
    name="nano", vocab_size=512, hidden_size=32, num_layers=3, num_heads=2, num_kv_heads=1,
    head_dim=16, intermediate_size=16, num_experts=5, top_k=2, initializer_range=0.3,
    # documents lie on both sides of the original length, also within a batch
    rope=RopeConfig(
        original_max_position=24, short_factor=(1.0,) * 8, long_factor=(4.0,) * 8, long_mscale=1.3
    ),
)  # fmt: skip

MakeRun = Callable[..., LoadedRun]
TraceIt = Callable[..., Traced]


@pytest.fixture(scope="session")
def split(short_documents: Path) -> TokenSplit:
    return open_split(short_documents, "validation", verify=True)


@pytest.fixture(scope="session")
def make_run(short_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Call make_run(seed=0, **changes of NANO): a checkpoint of a random model, opened."""

    def make(*, seed: int = 0, **changes: object) -> LoadedRun:
        config = TrainConfig(
            model=dataclasses.replace(NANO, **changes),
            data=DataConfig(seq_len=64),
            tokenizer=TokenizerConfig(vocab_size=512),
            paths=PathsConfig(data_dir=str(short_documents)),
        )
        model = build_model(config.model, config.router, seed=seed)
        folder = save_checkpoint(
            tmp_path_factory.mktemp("run") / "checkpoints",
            7,
            tensors={"model": dict(model.state_dict())},
            state={"train": {"precision": "float32"}},
            extra_files={
                "config.json": json.dumps(dataclasses.asdict(config)).encode(),
                "tokenizer.model": short_documents / "tokenizer.model",
            },
            keep_last=1,
        )
        return load_run(str(folder), device=torch.device("cpu"), on_skip=print)

    return make


@pytest.fixture(scope="session")
def run(make_run: MakeRun) -> LoadedRun:
    return make_run()


@pytest.fixture(scope="session")
def trace_it(run: LoadedRun, split: TokenSplit) -> TraceIt:
    """Call trace_it(folder, run=..., notes=..., **changes of the configuration)."""

    def trace(
        folder: Path,
        *,
        of: LoadedRun = run,
        notes: list[str] | None = None,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        **changes: object,
    ) -> Traced:
        config = TraceConfig(
            run="a run", target=str(folder), **{"batch_size": 4, "part_tokens": 400, **changes}
        )
        heard = [] if notes is None else notes
        return trace_corpus(config, of, split, on_progress=on_progress, on_note=heard.append)

    return trace


@pytest.fixture(scope="session")
def traced(trace_it: TraceIt, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The whole validation text with logits, in several parts. Look, do not touch."""
    folder = tmp_path_factory.mktemp("trace") / "whole"
    trace_it(folder, logits=True)
    return open_trace(folder)
