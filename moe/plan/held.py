"""How many numbers of each parameter a rank holds, and how ZeRO cuts them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from moe.config import ExpertsConfig, OptimConfig, RouterConfig
from moe.model.transformer import build_model
from moe.model_config import ModelConfig
from moe.plan.layout import Layout
from moe.sparse.dispatch import LocalDispatcher, Placement
from moe.train.optim import parameter_groups

# DeepSpeed 0.19.8 rounds a flat group up to a multiple of twice the ranks that share it
# (nccl_start_alignment_factor in runtime/zero/stage_1_and_2.py)
_ALIGNMENT = 2


@dataclass(frozen=True)
class Group:
    """Parameters that one flat buffer of ZeRO 1 and 2 holds, in its order."""

    is_expert: bool
    sizes: tuple[int, ...]  # elements of each parameter, as this rank holds it

    @property
    def total(self) -> int:
        return sum(self.sizes)


def held_groups(layout: Layout) -> tuple[Group, ...]:
    """The parameter groups of a rank, as the DeepSpeed engine makes them.

    The model is built on the meta device with the experts of one rank: shapes, no memory. So the
    sizes are those of the real parameters, whatever the model.
    """
    return _groups(layout.model, layout.expert_parallel_size)


@functools.lru_cache(maxsize=64)
def _groups(model: ModelConfig, expert_parallel_size: int) -> tuple[Group, ...]:
    placement = None
    if model.is_sparse:
        held = range(model.num_experts // expert_parallel_size)
        placement = Placement(held, LocalDispatcher())
    built = build_model(
        model, RouterConfig(), ExpertsConfig("reference"), device="meta", placement=placement
    )
    experts = {id(p) for name, p in built.named_parameters() if ".experts." in name}
    is_spread = expert_parallel_size > 1
    made = []
    for group in parameter_groups(built, OptimConfig()):
        for wants_experts in (False, True):
            sizes = tuple(
                p.numel()
                for p in group["params"]
                if (id(p) in experts and is_spread) == wants_experts
            )
            if sizes:
                made.append(Group(wants_experts, sizes))
    return tuple(made)


def num_sharing(layout: Layout, group: Group) -> int:
    """The ranks that hold the same numbers of a group: its gradients are reduced over them."""
    return layout.expert_data_size if group.is_expert else layout.world_size


def num_held(layout: Layout) -> int:
    """Parameters of one rank, before ZeRO cuts them."""
    return sum(group.total for group in held_groups(layout))


def flat_elements(layout: Layout, group: Group) -> int:
    """Elements of the flat buffer of ZeRO 1 and 2: rounded up for equal parts."""
    step = _ALIGNMENT * num_sharing(layout, group)
    return -(-group.total // step) * step


def partition_elements(layout: Layout, group: Group) -> int:
    """Elements of a rank's part: of the flat buffer (ZeRO 1, 2), of each parameter (ZeRO 3)."""
    n = num_sharing(layout, group)
    if layout.zero_stage == 0:
        return group.total
    if layout.zero_stage == 3:
        return sum(-(-size // n) for size in group.sizes)
    return flat_elements(layout, group) // n


def touched_elements(layout: Layout, group: Group) -> int:
    """Elements of all parameters that a rank's part of ZeRO 1 or 2 touches; the largest rank's.

    DeepSpeed keeps the reduced gradients of these whole parameters, not of the part alone: with
    experts stacked in one parameter that can be far more.
    """
    n = num_sharing(layout, group)
    return _most_touched(group, n, flat_elements(layout, group) // n)


@functools.lru_cache(maxsize=4096)
def _most_touched(group: Group, num_parts: int, part_size: int) -> int:
    touched, offset = [0] * num_parts, 0
    for elements in group.sizes:
        for part in range(offset // part_size, (offset + elements - 1) // part_size + 1):
            touched[part] += elements
        offset += elements
    return max(touched)
