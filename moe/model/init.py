"""How parameters start: a function of (seed, parameter name, expert), never of layout or order."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from moe.model_config import ModelConfig


def initialise(model: nn.Module, config: ModelConfig, *, seed: int, first_expert: int = 0) -> None:
    """Fill every parameter in place.

    | parameter | start |
    |---|---|
    | norm weight | 1 |
    | every bias | 0 |
    | everything else (embedding, projections, router, experts, head) | N(0, initializer_range^2) |

    Each expert draws from its own generator, so that a rank holding experts 4 to 7 starts them
    exactly as a rank holding all sixteen does. first_expert is the first one that is held.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith(".bias"):
                parameter.zero_()
            elif "norm." in name:
                parameter.fill_(1.0)
            elif ".experts." in name:
                for expert, weight in enumerate(parameter, start=first_expert):
                    _normal(weight, f"{seed}/{name}/{expert}", config.initializer_range)
            else:
                _normal(parameter, f"{seed}/{name}", config.initializer_range)


def _normal(tensor: Tensor, label: str, std: float) -> None:
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
