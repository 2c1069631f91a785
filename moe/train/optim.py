"""AdamW's parameter groups and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from moe.config import OptimConfig


def make_optimizer(
    model: nn.Module, config: OptimConfig, *, groups: list[dict[str, Any]] | None = None
) -> torch.optim.AdamW:
    """Return AdamW over parameter_groups(model), or over these groups made of them."""
    groups = parameter_groups(model, config) if groups is None else groups
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices decay, but not embeddings, norms, biases or the router.

    A decayed router shrinks its logits, and SparseMixer's survivors are those within 2 % of the
    largest: decay would change how often the second expert of a tie survives. Told by name: an
    engine may have partitioned the parameters, which leaves them without their shapes.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        is_vector = name.rpartition(".")[2] == "bias" or "norm." in name
        is_spared = is_vector or ".router." in name or name.startswith("embed.")
        (plain if is_spared else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(step: int, *, config: OptimConfig, num_steps: int) -> float:
    """Return the rate of step 0 .. num_steps - 1: linear warm-up, then the schedule.

    cosine: to final_lr_ratio at the end. wsd: constant, then linear over the last decay_fraction.
    """
    if step < config.warmup_steps:
        return config.lr * ((step + 1) / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        num_decay = max(1, round(config.decay_fraction * num_steps))
        share = min(1.0, (num_steps - 1 - step) / num_decay)
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * share)
