"""Which parameters decay, and the learning rate at every corner of its schedules."""

from __future__ import annotations

import math

import pytest
import torch

from moe.config import OptimConfig, RouterConfig
from moe.model.transformer import build_model
from moe.model_config import ModelConfig
from moe.train.optim import learning_rate, make_optimizer

NANO = ModelConfig(
    name="nano", vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=8, intermediate_size=8, num_experts=4, top_k=2,
)  # fmt: skip


def names_by_decay(model: torch.nn.Module, config: OptimConfig) -> dict[float, set[str]]:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, config).param_groups
    return {group["weight_decay"]: {name_of[p] for p in group["params"]} for group in groups}


def test_exactly_these_parameters_of_a_sparse_model_decay() -> None:
    groups = names_by_decay(build_model(NANO), OptimConfig(weight_decay=0.1))
    assert groups[0.1] == {
        "blocks.0.attention.query.weight",
        "blocks.0.attention.key.weight",
        "blocks.0.attention.value.weight",
        "blocks.0.attention.output.weight",
        "blocks.0.feed_forward.experts.gate_up",
        "blocks.0.feed_forward.experts.down",
        "head.weight",
    }
    assert groups[0.0] == {
        "embed.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention_norm.bias",
        "blocks.0.attention.query.bias",
        "blocks.0.attention.key.bias",
        "blocks.0.attention.value.bias",
        "blocks.0.attention.output.bias",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward_norm.bias",
        "blocks.0.feed_forward.router.weight",
        "norm.weight",
        "norm.bias",
        "head.bias",
    }


def test_every_parameter_is_in_one_group_and_tied_ones_are_there_once() -> None:
    model = build_model(ModelConfig(**{**NANO.__dict__, "tie_embeddings": True}), RouterConfig())
    groups = make_optimizer(model, OptimConfig()).param_groups
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(model.parameters())
    # tied, the matrix is an embedding first: it does not decay
    assert "embed.weight" in names_by_decay(model, OptimConfig())[0.0]


def test_the_optimizer_has_the_configured_numbers() -> None:
    config = OptimConfig(lr=0.5, beta1=0.7, beta2=0.8, eps=1e-4, weight_decay=0.3)
    for group in make_optimizer(build_model(NANO), config).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.7, 0.8), 1e-4)


def rates(num_steps: int, config: OptimConfig) -> list[float]:
    return [learning_rate(step, config=config, num_steps=num_steps) for step in range(num_steps)]


def test_warm_up_is_linear_and_never_zero() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="constant")
    assert rates(6, config) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_starts_at_the_peak_passes_its_middle_and_ends_at_its_ratio() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=2, schedule="cosine", final_lr_ratio=0.1)
    seen = rates(13, config)
    assert seen[:3] == [1.0, 2.0, 2.0]  # the last of the warm-up, and the first of the cosine
    assert seen[7] == pytest.approx(2.0 * 0.55)  # half way from step 2 to step 12
    assert seen[12] == pytest.approx(0.2)
    assert seen[2:] == sorted(seen[2:], reverse=True)
    expected = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.3)))
    assert seen[5] == pytest.approx(expected)


def test_wsd_is_flat_and_then_falls_in_a_straight_line_to_its_ratio() -> None:
    config = OptimConfig(
        lr=1.0, warmup_steps=1, schedule="wsd", decay_fraction=0.4, final_lr_ratio=0.2
    )
    assert rates(10, config) == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize(
    ("num_steps", "warmup_steps"),
    [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (7, 7), (7, 6), (5, 0)],
)
def test_short_runs_keep_every_rate_above_zero_and_at_most_the_peak(
    schedule: str, num_steps: int, warmup_steps: int
) -> None:
    config = OptimConfig(lr=3e-3, warmup_steps=warmup_steps, schedule=schedule)
    seen = rates(num_steps, config)
    assert all(0 < rate <= 3e-3 for rate in seen)
    if warmup_steps:
        assert seen[warmup_steps - 1] == 3e-3


def test_no_part_of_the_run_decays_with_a_decay_fraction_of_zero_but_the_last_step() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=0, schedule="wsd", decay_fraction=0.0)
    assert rates(5, config) == pytest.approx([1, 1, 1, 1, 0.1])
