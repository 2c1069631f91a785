"""How parameters start: a function of (seed, parameter name, expert), never of layout or order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.model_config import ModelConfig

# Numbers are drawn in blocks, each from a generator of its own, so that a rank that holds a part of
# a parameter draws a little more than that part.
BLOCK_NUMBERS = 2**22


class KeptPart(NamedTuple):
    """What a process keeps of a parameter: flat, from element `start` of the whole on."""

    values: Tensor
    start: int


# with each module whose own parameters have just been made; parts of those kept in part, by name
WhenReady = Callable[[nn.Module], Mapping[str, KeptPart]]


def materialise(
    model: nn.Module,
    config: ModelConfig,
    *,
    seed: int | None,
    device: str | torch.device,
    first_expert: int = 0,
    when_ready: WhenReady | None = None,
) -> None:
    """Give a model on the meta device its memory and its start, one module after the other.

    | parameter | start |
    |---|---|
    | norm weight | 1 |
    | every bias | 0 |
    | everything else (embedding, projections, router, experts, head) | N(0, initializer_range^2) |

    Each expert draws from its own generators, so that a rank holding experts 4 to 7 starts them
    exactly as a rank holding all sixteen does. first_expert is the first one that is held. seed
    None leaves zeros, for parameters that are loaded: drawing those of a large model takes minutes.

    when_ready is called with each module whose own parameters have just been made, before they are
    started, so that an engine may keep a part of them before the next are; only that part is drawn.
    A parameter shared by two modules (tied embeddings) is made once.
    """
    made: dict[int, nn.Parameter] = {}  # by the identity of the parameter on the meta device
    shapes = []  # keeps those alive, so that no identity is used twice
    for prefix, module in model.named_modules():
        new = []
        for name, empty in list(module.named_parameters(recurse=False)):
            shapes.append(empty)
            if id(empty) not in made:
                made[id(empty)] = nn.Parameter(torch.empty_like(empty, device=device))
                new.append((name, made[id(empty)], empty.shape))
            setattr(module, name, made[id(empty)])
        kept: Mapping[str, KeptPart] = {}
        if when_ready is not None and next(module.parameters(recurse=False), None) is not None:
            kept = when_ready(module)
        for name, real, shape in new:
            part = kept[name] if name in kept else KeptPart(real.detach().view(-1), 0)
            if seed is None:
                part.values.zero_()
                continue
            whole_name = f"{prefix}.{name}" if prefix else name
            _start(whole_name, part, shape, config, seed=seed, first_expert=first_expert)


@torch.no_grad()
def _start(
    name: str,
    part: KeptPart,
    shape: torch.Size,
    config: ModelConfig,
    *,
    seed: int,
    first_expert: int,
) -> None:
    if name.endswith(".bias"):
        part.values.zero_()
    elif "norm." in name:
        part.values.fill_(1.0)
    elif ".experts." in name:
        per_expert = math.prod(shape[1:])
        for index in range(shape[0]):
            label = f"{seed}/{name}/{first_expert + index}"
            _normal(part, index * per_expert, per_expert, label, std=config.initializer_range)
    else:
        _normal(part, 0, shape.numel(), f"{seed}/{name}", std=config.initializer_range)


def _normal(part: KeptPart, first: int, count: int, label: str, *, std: float) -> None:
    """Draw what is kept of the whole's elements first to first + count, which have one label."""
    end = part.start + part.values.numel()
    for number, begin in enumerate(range(first, first + count, BLOCK_NUMBERS)):
        size = min(BLOCK_NUMBERS, first + count - begin)
        low, high = max(begin, part.start), min(begin + size, end)
        if low >= high:
            continue
        # the first block's label is the whole's: a small tensor is one draw
        drawn = _draw(f"{label}/block {number}" if number else label, size)
        part.values[low - part.start : high - part.start].copy_(
            drawn[low - begin : high - begin] * std
        )


def _draw(label: str, size: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
    return torch.randn(size, generator=generator)
