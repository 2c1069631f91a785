"""How long a whole run takes, and how this layout stands beside others of the same GPUs."""

from __future__ import annotations

import dataclasses
import math

from moe.plan.advice import Change, changes, fastest_that_fits, usable_bytes
from moe.plan.layout import Layout
from moe.plan.memory import rank_memory
from moe.plan.report import in_words, table_lines
from moe.plan.times import implied_mfu, step_mfu, step_time
from moe.plan_config import ClusterConfig

_DAY = 86_400


def run_lines(layout: Layout, cluster: ClusterConfig, *, tokens: float, days: float) -> list[str]:
    """Days of a run of so many tokens, and what a known number of days implies; nothing for 0."""
    if not tokens:
        return []
    time = step_time(layout, cluster)
    num_steps = math.ceil(tokens / time.tokens)
    best = fastest_that_fits(layout, cluster)
    planned = {f"this plan, {num_steps:,} steps": layout}
    if best is not None and best.keys:
        planned["the fastest layout that fits (below)"] = best.layout
    rows = []
    for name, each in planned.items():
        own = step_time(each, cluster)
        seconds = num_steps * own.seconds
        rows.append(
            (
                name,
                f"{seconds / _DAY:,.1f}",
                f"{tokens / seconds / layout.world_size:,.0f}",
                f"{step_mfu(own, world_size=layout.world_size):.1%}",
            )
        )
    if days:
        mfu = implied_mfu(
            time.flops_per_token,
            tokens=tokens,
            days=days,
            num_gpus=layout.world_size,
            peak_flops=time.peak_flops,
        )
        rate = tokens / (days * _DAY * layout.world_size)
        rows.insert(0, ("as it is said to have been", f"{days:,.1f}", f"{rate:,.0f}", f"{mfu:.1%}"))
    heads = ("days", "tokens/s a GPU", "MFU")
    lines = table_lines(f"the whole run, {tokens:.3g} tokens", heads, rows, num_sums=0)
    per_token = f"{time.flops_per_token / 1e9:,.2f} GFLOP of training a token"
    return [*lines, f"{per_token}, recomputation not counted"]


def compare_lines(layout: Layout, cluster: ClusterConfig) -> list[str]:
    """One line for each combination of expert parallelism and ZeRO with the other keys as they
    are, and the fastest layout of all that fits."""
    every = changes(layout, cluster)
    own = Change((), layout, rank_memory(layout).total, step_time(layout, cluster).seconds)
    beside = [change for change in (own, *every) if _is_beside(change.layout, layout)]
    beside.sort(key=lambda change: _place(change.layout))
    limit = usable_bytes(cluster)
    rows, notes = [], []
    for change in beside:
        size, stage = _place(change.layout)
        mfu = step_mfu(step_time(change.layout, cluster), world_size=layout.world_size)
        rows.append(
            (
                f"expert parallel {size:>2}, ZeRO {stage}{' *' if change is own else ''}",
                in_words(change.num_bytes),
                f"{change.seconds:,.2f}",
                f"{mfu:.1%}",
            )
        )
        fits = change.num_bytes <= limit
        notes.append("fits" if fits else f"does not fit: {_largest_part(change.layout)}")
    heads = ("memory", "s a step", "MFU")
    lines = table_lines("layouts beside this one (*)", heads, rows, num_sums=0)
    num_head = len(lines) - len(rows)
    lines[num_head:] = [
        f"{line}   {note}" for line, note in zip(lines[num_head:], notes, strict=True)
    ]
    best = fastest_that_fits(layout, cluster)
    if best is None:
        return [*lines, "no layout fits these GPUs"]
    mfu = step_mfu(step_time(best.layout, cluster), world_size=layout.world_size)
    keys = " ".join(best.keys) or "this one"
    return [
        *lines,
        f"fastest that fits: {keys}",
        f"  {in_words(best.num_bytes)}, {best.seconds:,.2f} s a step, MFU {mfu:.1%}",
    ]


def _place(layout: Layout) -> tuple[int, int]:
    return layout.expert_parallel_size, layout.zero_stage


def _is_beside(other: Layout, layout: Layout) -> bool:
    size, stage = _place(layout)
    return dataclasses.replace(other, expert_parallel_size=size, zero_stage=stage) == layout


def _largest_part(layout: Layout) -> str:
    """What takes the most of a rank's memory: a part of the state, or the fullest moment."""
    memory = rank_memory(layout)
    parts = {**memory.state, "activations and gradients": memory.moments[memory.fullest]}
    part = max(parts, key=lambda name: parts[name])
    return f"{part} {in_words(parts[part])}"
