"""How routing changes while a model trains: from its log, its recorded steps, its checkpoints.

The log has every step's load but no tokens; recorded steps (train.trace_every) have tokens with
their domains, other ones each step; traces of checkpoints have the same tokens every time, and only
they say whether a token's experts changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.adding import total
from analysis.aligned import aligned
from analysis.balance import clusters_of
from analysis.bootstrap import Interval, bootstrap_deviation
from analysis.count_trace import layered
from analysis.overlap import OverlapCounts, count_overlap, overlap_interval, saturation
from analysis.routing_counts import RoutingCounts, count_routing
from analysis.specialisation import share_explained
from analysis.utilisation import coefficient_of_variation, dead_experts
from moe.errors import DataError
from moe.trace.read import Trace, require_same_tokens
from moe.train.metrics import Record

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LogSeries:
    """What a run's log says of routing, by blocks of steps that follow each other; B blocks."""

    step_B: Floats  # mean of the block's steps
    load_BLE: Floats  # each expert's share of its layer's choices, mean over the block's steps
    variation_BL: Floats  # coefficient of variation of that load
    chance_B: Floats  # what even routing of as many tokens, each for itself, would give
    entropy_BL: Floats  # of the router's softmax, nats, mean over tokens
    dead_B: NDArray[np.int64]  # experts of all layers that no token of the block chose
    loss_B: Floats  # training loss, nats per token
    balance_B: Floats  # the balance loss, before its coefficient


@dataclass(frozen=True, eq=False)
class Saturation:
    """Overlap of each checkpoint's choices with the last one's, on the same tokens."""

    steps: tuple[int, ...]  # ascending, without the last
    last_step: int
    overlap: tuple[Interval, ...]  # (L,) each, analysis.overlap.saturation
    joint_LEE: NDArray[np.int64]  # of the first checkpoint and the last, for chance_saturation


def log_series(metrics: Sequence[Record], *, top_k: int, num_blocks: int = 60) -> LogSeries:
    """Gather a run's records (moe.train.metrics.read_metrics) into at most num_blocks blocks.

    chance_B is sqrt((E - K) / (N K)) for a block of N tokens that choose K different experts evenly
    and independently. Tokens of a document are alike, so real noise is larger. Raises DataError
    where no record has router/load_LE: the log of a dense model.
    """
    records = [record for record in metrics if record.get("router/load_LE")]
    if not records:
        raise DataError(
            "metrics: no record has router/load_LE, as that of a dense model; give a run whose "
            "model has model.num_experts above 0."
        )
    step = np.array([record["step"] for record in records], dtype=np.float64)
    seen = np.array([record["tokens_seen"] for record in records], dtype=np.float64)
    tokens = np.diff(seen, prepend=0.0) / np.maximum(np.diff(step, prepend=0.0), 1.0)
    load = np.array([record["router/load_LE"] for record in records], dtype=np.float64)
    blocks = [b for b in np.array_split(np.arange(len(records)), num_blocks) if len(b)]

    def mean_of(value: Floats) -> Floats:
        return np.stack([value[block].mean(axis=0) for block in blocks])

    def column(name: str) -> Floats:
        return np.array([record[name] for record in records], dtype=np.float64)

    num_experts = load.shape[-1]
    choices_B = top_k * np.array([tokens[block].sum() for block in blocks])
    load_BLE = mean_of(load)
    return LogSeries(
        step_B=mean_of(step),
        load_BLE=load_BLE,
        variation_BL=coefficient_of_variation(load_BLE),
        chance_B=np.sqrt((num_experts - top_k) / choices_B),
        entropy_BL=mean_of(column("router/entropy_L")),
        dead_B=dead_experts(load_BLE).sum(axis=(1, 2)),
        loss_B=mean_of(column("loss")),
        balance_B=mean_of(column("loss/balance")),
    )


def count_blocks(
    trace: Trace, *, num_blocks: int = 6, num_groups: int = 64
) -> tuple[Floats, list[RoutingCounts]]:
    """Recorded steps in at most num_blocks blocks: the mean step (B,) and the counts of each.

    Raises DataError for a trace that was not recorded in training.
    """
    info = trace.info
    if not info.layout.has_steps:
        raise DataError(
            f"{trace.folder}: its rows have no steps; give routing/ of a run that recorded its "
            "routing in training (train.trace_every)."
        )
    blocks = [b for b in np.array_split(np.array(info.steps), num_blocks) if len(b)]
    counted = []
    for block in blocks:
        batches = trace.batches(("document", "domain", "expert", "weight"), steps=block.tolist())
        parts = (
            count_routing(
                layered(batch), num_experts=info.num_experts, num_domains=len(info.domains),
                num_groups=num_groups,
            )
            for batch in batches
        )  # fmt: skip
        counted.append(total(parts))
    return np.array([block.mean() for block in blocks]), counted


def domain_dependence(
    counts: RoutingCounts, *, num_samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """(L,): analysis.specialisation.share_explained by the domain, with intervals over documents.

    The root of what a sample explains is of the size of its noise where the domain says nothing,
    so that the interval is one of a deviation (analysis.bootstrap): it may lie below the estimate,
    which is not corrected, and reaches 0 where no dependence is seen.
    """
    choice_CLE, stratum_C = clusters_of(counts)
    num_domains = len(counts.token_DG)
    is_in_CD = stratum_C[:, None] == np.arange(num_domains)
    choice_CLDE = choice_CLE[:, :, None, :] * is_in_CD[:, None, :, None]
    root = bootstrap_deviation(
        [choice_CLDE],
        lambda table: np.sqrt(share_explained(table, is_corrected=False)),
        stratum_C=stratum_C, num_samples=num_samples, level=level, seed=seed,
    )  # fmt: skip
    return Interval(root.estimate**2, root.low**2, root.high**2, level, root.num_clusters)


def saturation_over(traces: Sequence[tuple[int, Trace]], *, num_groups: int = 512) -> Saturation:
    """Overlap of the choices of checkpoints (step, trace), ascending, with those of the last.

    Raises DataError for fewer than two, and where they are not of the same tokens.
    """
    if len(traces) < 2:
        raise DataError(
            f"traces: got {len(traces)}; saturation compares checkpoints, so give two or more."
        )
    last_step, last = traces[-1]
    overlap: list[Interval] = []
    first: OverlapCounts | None = None
    for _, trace in traces[:-1]:
        require_same_tokens(trace, last)
        counts = overlap_of(trace, last, num_groups=num_groups)
        first = first or counts
        overlap.append(overlap_interval(counts, saturation))
    assert first is not None
    steps = tuple(step for step, _ in traces[:-1])
    return Saturation(steps, last_step, tuple(overlap), first.joint_LEE)


def overlap_of(one: Trace, two: Trace, *, num_groups: int = 512) -> OverlapCounts:
    """Count two traces of the same tokens side by side (analysis.overlap.count_overlap)."""
    columns = ("token", "position", "document", "domain", "expert")
    pairs = aligned(one.batches(columns), two.batches(columns))
    info = one.info
    return total(
        count_overlap(
            first, second, num_experts=info.num_experts, num_domains=len(info.domains),
            num_groups=num_groups,
        )
        for first, second in pairs
    )  # fmt: skip
