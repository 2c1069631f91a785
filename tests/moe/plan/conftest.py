"""The measuring commands of launch/ are importable, and the published models are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from moe.config import ExpertsConfig, RouterConfig
from moe.config_from_dict import from_dict
from moe.model_config import ModelConfig
from moe.plan.layout import Layout

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "launch"))


@pytest.fixture(scope="session")
def phi35_moe() -> ModelConfig:
    """The real one: 41,873,153,344 parameters."""
    values: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/model/phi35_moe.yaml"))
    return from_dict(ModelConfig, values)


@pytest.fixture(scope="session")
def on_512(phi35_moe: ModelConfig) -> Layout:
    """Phi-3.5-MoE on 64 nodes of 8, experts over a node, ZeRO 1, everything recomputed."""
    return Layout(
        model=phi35_moe,
        router=RouterConfig(balance_scope="global"),
        experts=ExpertsConfig(),
        world_size=512,
        gpus_per_node=8,
        expert_parallel_size=8,
        zero_stage=1,
        micro_batch_size=1,
        num_micro=2,
        seq_len=4096,
        dtype="bfloat16",
        activation_checkpointing=True,
        bf16_parameters=False,
        offload_optimizer=False,
    )
