"""Everything the analysis counts of a trace, in one pass over it.

Memory does not grow with the trace; launch/measure_trace.py measures 10 million tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from analysis.adding import add_into
from analysis.co_activation import PairCounts, count_pairs
from analysis.key_counts import NUM_POSITION_BUCKETS, KeyCounts, count_by_key, position_bucket
from analysis.layer_agreement import LayerPairCounts, count_layer_pairs
from analysis.margins import MarginCounts, count_margins
from analysis.routing_counts import NUM_GROUPS, RoutingCounts, count_routing
from moe.errors import DataError
from moe.trace.batch import TraceBatch, join_rows, slice_rows

if TYPE_CHECKING:
    from moe.trace.info import TraceInfo
    from moe.trace.read import Trace

Value = TypeVar("Value")

_ROWS = 2**17  # tokens at once: adding the tables after each is then a small part of the work
_LAYER_PAIR_TOKENS = 1_000_000  # all pairs of 32 layers cost more than everything else together
_COLUMNS = ("token", "position", "document", "domain", "expert", "weight")


@dataclass(frozen=True, eq=False)
class TraceCounts:
    """What was counted of a trace; the metrics of each part are in the module that defines it."""

    routing: RoutingCounts
    pairs: PairCounts
    positions: KeyCounts  # first choices by analysis.key_counts.position_bucket
    layer_pairs: LayerPairCounts  # of about a million tokens
    tokens: KeyCounts | None  # first choices by token id
    margins: MarginCounts | None  # of a trace with logits


def count_trace(
    trace: Trace,
    *,
    vocab_size: int | None = None,
    threshold: float | None = None,
    num_groups: int = NUM_GROUPS,
) -> TraceCounts:
    """Count a whole trace (moe.trace.read.open_trace) in one pass.

    vocab_size: count by token id too, which takes 2 * L * V * E * 8 bytes meanwhile. threshold:
    router.mask_threshold of a SparseMixer model, for its masked fraction. Margins are counted where
    the trace has logits. Raises DataError for a trace without tokens, for damaged parts, and for
    tokens, experts or domains that are not in the ranges that the trace says.
    """
    info = trace.info
    columns = (*_COLUMNS, "logit") if info.has_logits else _COLUMNS
    counted: TraceCounts | None = None
    for batch in gathered(trace.batches(columns, max_rows=_ROWS), num_rows=_ROWS):
        part = _count_batch(
            batch, info, vocab_size=vocab_size, threshold=threshold, num_groups=num_groups
        )
        counted = part if counted is None else _add(counted, part)
    return _required(counted)


def count_steps(trace: Trace, *, num_groups: int = 1) -> dict[int, RoutingCounts]:
    """The routing of each recorded step of a training run, by step; memory is that of all of them.

    One group of documents by default: enough for load and domains over time, without intervals.
    Raises DataError for a trace that was not recorded in training, or has no tokens.
    """
    info = trace.info
    if not info.layout.has_steps:
        raise DataError(
            "trace: its rows have no steps; give one that was recorded in training, or count each "
            "checkpoint's trace with count_trace."
        )
    counted: dict[int, RoutingCounts] = {}
    columns = ("document", "domain", "expert", "weight", "step")
    for batch in trace.batches(columns, max_rows=_ROWS):
        step_T = np.asarray(batch.step_T)
        starts = np.flatnonzero(np.diff(step_T, prepend=-1))
        stops = np.append(starts[1:], batch.num_rows)
        for start, stop in zip(starts, stops, strict=True):
            rows = layered(slice_rows(batch, int(start), int(stop)))
            part = count_routing(
                rows,
                num_experts=info.num_experts,
                num_domains=len(info.domains),
                num_groups=num_groups,
            )
            step = int(step_T[start])
            counted[step] = add_into(counted.get(step), part)
    return dict(sorted(_required(counted or None).items()))


def gathered(batches: Iterable[TraceBatch], *, num_rows: int) -> Iterator[TraceBatch]:
    """Yield batches joined to at least num_rows rows each, the last fewer, `layered`.

    Small ones, as short parts give, would spend their time on adding tables of counts.
    """
    waiting: list[TraceBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(b.num_rows for b in waiting) >= num_rows:
            yield layered(join_rows(waiting))
            waiting = []
    if waiting:
        yield layered(join_rows(waiting))


def layered(batch: TraceBatch) -> TraceBatch:
    """The same batch with each layer's and choice's tokens side by side in memory.

    Counting goes layer by layer: over rows of 64 numbers it would fetch each from memory 64 times.
    """
    return batch._replace(
        expert_TLK=_tokens_last(batch.expert_TLK), weight_TLK=_tokens_last(batch.weight_TLK)
    )


def _tokens_last(values_TLK: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values_TLK.transpose(1, 2, 0)).transpose(2, 0, 1)


def _count_batch(
    batch: TraceBatch,
    info: TraceInfo,
    *,
    vocab_size: int | None,
    threshold: float | None,
    num_groups: int,
) -> TraceCounts:
    experts, domains = info.num_experts, len(info.domains)
    stride = max(1, info.num_tokens // _LAYER_PAIR_TOKENS)
    has_margins = info.has_logits and info.top_k < experts
    return TraceCounts(
        routing=count_routing(
            batch, num_experts=experts, num_domains=domains, num_groups=num_groups
        ),
        pairs=count_pairs(batch, num_experts=experts),
        positions=count_by_key(
            position_bucket(batch.position_T),
            batch.expert_TLK,
            num_keys=NUM_POSITION_BUCKETS,
            num_experts=experts,
        ),
        layer_pairs=count_layer_pairs(batch, num_experts=experts, stride=stride),
        tokens=None
        if vocab_size is None
        else count_by_key(
            batch.token_T, batch.expert_TLK, num_keys=vocab_size, num_experts=experts
        ),
        margins=count_margins(
            batch,
            num_experts=experts,
            num_domains=domains,
            num_groups=num_groups,
            threshold=threshold,
        )
        if has_margins
        else None,
    )


def _add(summed: TraceCounts, part: TraceCounts) -> TraceCounts:
    both = {name: (value, getattr(part, name)) for name, value in vars(summed).items()}
    return replace(
        summed, **{name: add_into(*pair) for name, pair in both.items() if pair[1] is not None}
    )


def _required(counted: Value | None) -> Value:
    if counted is None:
        raise DataError("trace: it has no tokens; trace some documents first.")
    return counted
