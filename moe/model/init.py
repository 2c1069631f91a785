"""How parameters start: a function of (seed, parameter name, expert), never of layout or order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.model_config import ModelConfig


def materialise(
    model: nn.Module,
    config: ModelConfig,
    *,
    seed: int,
    device: str | torch.device,
    first_expert: int = 0,
    when_ready: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give a model on the meta device its memory and its start, one module after the other.

    | parameter | start |
    |---|---|
    | norm weight | 1 |
    | every bias | 0 |
    | everything else (embedding, projections, router, experts, head) | N(0, initializer_range^2) |

    Each expert draws from its own generator, so that a rank holding experts 4 to 7 starts them
    exactly as a rank holding all sixteen does. first_expert is the first one that is held.

    when_ready is called with each module whose own parameters have just been made, so that an
    engine may keep a part of them before the next are. A parameter shared by two modules (tied
    embeddings) is made once.
    """
    made: dict[int, nn.Parameter] = {}  # by the identity of the parameter on the meta device
    shapes = []  # keeps those alive, so that no identity is used twice
    for prefix, module in model.named_modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            shapes.append(empty)
            if id(empty) not in made:
                real = nn.Parameter(torch.empty_like(empty, device=device))
                whole_name = f"{prefix}.{name}" if prefix else name
                _start(whole_name, real, config, seed=seed, first_expert=first_expert)
                made[id(empty)] = real
            setattr(module, name, made[id(empty)])
        if when_ready is not None and next(module.parameters(recurse=False), None) is not None:
            when_ready(module)


def _start(
    name: str, parameter: nn.Parameter, config: ModelConfig, *, seed: int, first_expert: int
) -> None:
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
