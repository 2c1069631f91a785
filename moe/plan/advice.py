"""What to change in a layout that does not fit: every change is computed, none is guessed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from moe.plan.layout import Layout
from moe.plan.memory import rank_memory
from moe.plan.times import step_time
from moe.plan_config import ClusterConfig

_GIB = 2**30


@dataclass(frozen=True)
class Change:
    """Another layout of the same training: the same model, GPUs and windows of a step."""

    keys: tuple[str, ...]  # what to set, as on the command line
    layout: Layout
    num_bytes: int  # of one rank
    seconds: float  # of a step


def usable_bytes(cluster: ClusterConfig) -> int:
    """What a rank may use of its GPU."""
    return int((cluster.memory_gib - cluster.reserved_gib) * _GIB)


def changes(layout: Layout, cluster: ClusterConfig) -> list[Change]:
    """Every other layout with what it needs, fewest changes first, the fastest of those first."""
    made = []
    for other, keys in _others(layout):
        seconds = step_time(other, cluster).seconds
        made.append(Change(keys, other, rank_memory(other).total, seconds))
    return sorted(made, key=lambda change: (len(change.keys), change.seconds))


def changes_that_fit(layout: Layout, cluster: ClusterConfig, *, most: int = 3) -> list[Change]:
    """The first of `changes` that fit; empty where none does."""
    limit = usable_bytes(cluster)
    fitting = (change for change in changes(layout, cluster) if change.num_bytes <= limit)
    return list(itertools.islice(fitting, most))


def fastest_that_fits(layout: Layout, cluster: ClusterConfig) -> Change | None:
    """The fastest layout of this training on these GPUs, the given one included."""
    memory = rank_memory(layout).total
    own = Change((), layout, memory, step_time(layout, cluster).seconds)
    limit = usable_bytes(cluster)
    fitting = [c for c in (own, *changes(layout, cluster)) if c.num_bytes <= limit]
    return min(fitting, key=lambda change: change.seconds, default=None)


def smallest(layout: Layout, cluster: ClusterConfig) -> Change:
    """The layout that needs the fewest bytes of a rank."""
    return min(changes(layout, cluster), key=lambda change: change.num_bytes)


def _others(layout: Layout) -> Iterator[tuple[Layout, tuple[str, ...]]]:
    """All layouts that differ in something that can be set."""
    bf16 = (False, True) if layout.dtype == "bfloat16" else (False,)
    micro = sorted({layout.micro_batch_size, 1})
    for size, stage, checkpointing, recompute, windows, is_bf16 in itertools.product(
        layout.expert_sizes(), (0, 1, 2, 3), (False, True), (False, True), micro, bf16
    ):
        if stage == 0 and (is_bf16 or layout.offload_optimizer):
            continue
        if recompute and (checkpointing or not layout.model.is_sparse):
            continue  # the whole layer is computed again anyway
        other = dataclasses.replace(
            layout,
            expert_parallel_size=size,
            zero_stage=stage,
            activation_checkpointing=checkpointing,
            experts=dataclasses.replace(layout.experts, recompute=recompute),
            micro_batch_size=windows,
            num_micro=layout.num_micro * layout.micro_batch_size // windows,
            bf16_parameters=is_bf16,
        )
        keys = _keys(layout, other)
        if keys:
            yield other, keys


def _keys(old: Layout, new: Layout) -> tuple[str, ...]:
    values = {
        "parallel.expert_parallel_size": (old.expert_parallel_size, new.expert_parallel_size),
        "parallel.zero_stage": (old.zero_stage, new.zero_stage),
        "train.activation_checkpointing": (
            old.activation_checkpointing,
            new.activation_checkpointing,
        ),
        "experts.recompute": (old.experts.recompute, new.experts.recompute),
        "train.micro_batch_size": (old.micro_batch_size, new.micro_batch_size),
        "parallel.bf16_parameters": (old.bf16_parameters, new.bf16_parameters),
    }
    return tuple(
        f"{key}={str(after).lower()}" for key, (before, after) in values.items() if before != after
    )
