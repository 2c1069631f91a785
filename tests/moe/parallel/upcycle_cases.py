"""The models of the upcycling tests: a dense one with random biases too, and its sparse form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from moe.config import DataConfig, LoopConfig, ParallelConfig, RouterConfig, TrainConfig
from moe.model.transformer import build_model
from moe.model_config import ModelConfig
from moe.train.checkpoint import save_checkpoint

DENSE = ModelConfig(
    name="dense", vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, intermediate_size=16, num_experts=0, max_position=64, initializer_range=0.1,
)  # fmt: skip
SPARSE = dataclasses.replace(DENSE, name="sparse", num_experts=4)
SUM_TO_ONE = RouterConfig(name="topk", renormalise=True)
TOKENS_BS = torch.arange(120).view(2, 60) * 7 % 512


def save_dense(folder: Path, *, model: ModelConfig = DENSE, **tensors_as: Any) -> str:
    """A checkpoint of a model none of whose parameters is a constant; tensors_as: of Tensor.to."""
    made, generator = build_model(model, seed=11), torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    saved = save_checkpoint(
        folder / "checkpoints",
        5,
        tensors={"model": {n: p.detach().to(**tensors_as) for n, p in made.named_parameters()}},
        state={"train": {"precision": "float32", "step": 5, "tokens_seen": 0}},
        extra_files={
            "config.json": json.dumps(dataclasses.asdict(TrainConfig(
                model=model, data=DataConfig(seq_len=64)
            ))).encode()
        },
        keep_last=1,
    )  # fmt: skip
    return str(saved)


def sparse_config(
    init_from: str,
    *,
    model: ModelConfig = SPARSE,
    router: RouterConfig = SUM_TO_ONE,
    parallel: ParallelConfig | None = None,
) -> TrainConfig:
    """A run that upcycles init_from."""
    return TrainConfig(
        seed=3, model=model, router=router, data=DataConfig(seq_len=64),
        parallel=parallel or ParallelConfig(engine="plain"),
        train=LoopConfig(precision="float32", init_from=init_from, upcycle=True),
    )  # fmt: skip
