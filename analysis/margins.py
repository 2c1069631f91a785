"""How close the next choice was: gaps between the largest router logits of a token.

The margin k (from 0) is the k-th largest logit less the one after it, in nats: the log of the odds
at which a softmax router prefers one to the other. Margin 0 says how close the second choice was to
being the first; margin K - 1 how close the first expert left out was to being chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.adding import Counts
from analysis.batch_checks import check_experts, check_range
from analysis.bootstrap import Interval, Statistic, bootstrap
from analysis.routing_counts import NUM_GROUPS, group_of_document
from analysis.sparsemixer_mask import NUM_STAGES, num_survivors
from moe.errors import DataError
from moe.trace.batch import TraceBatch

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# edges of the histogram in nats: fine where choices are in doubt, up to odds of 1 to 10**8
MARGIN_EDGES = np.concatenate([[0.0], np.geomspace(0.01, 20.0, 60), [np.inf]])
_ROWS = 8192  # of tokens worked on at once, to stay within the cache


@dataclass(frozen=True, eq=False)
class MarginCounts(Counts):
    """Margins by layer and choice; masked experts too if a SparseMixer threshold was given.

    H bins of MARGIN_EDGES; C clusters, each a group of documents of a domain (domain * G + group).
    """

    histogram_LKH: Integers
    sum_CLK: Floats
    token_C: Integers
    survivor_CLK: Integers  # sum of num_survivors; zeros without a threshold
    alone_CLK: Integers  # tokens of which only one expert survived
    num_experts: int
    num_domains: int
    threshold: float | None


def margins(logit: NDArray[np.floating], *, top_k: int) -> Floats:
    """(..., E) -> (..., K): margins 0 to K - 1 in nats, never negative; K < E.

    Of the logits, not of what was chosen: in training SparseMixer samples its choices.
    """
    num_experts = logit.shape[-1]
    if not 1 <= top_k < num_experts:
        raise ValueError(
            f"top_k: got {top_k} of {num_experts} experts; a margin needs an expert left out, so "
            f"it must be 1 to {num_experts - 1}."
        )
    largest = np.partition(logit, range(num_experts - top_k - 1, num_experts), axis=-1)
    largest = largest[..., : -top_k - 2 : -1].astype(np.float64)
    return largest[..., :-1] - largest[..., 1:]


def count_margins(
    batch: TraceBatch,
    *,
    num_experts: int,
    num_domains: int,
    num_groups: int = NUM_GROUPS,
    threshold: float | None = None,
) -> MarginCounts:
    """Count one batch with logits; sum over batches with analysis.adding.total or `+`.

    threshold is router.mask_threshold of a SparseMixer model, None for other routers. Raises
    DataError for a trace that was recorded without logits.
    """
    if batch.logit_TLE is None:
        raise DataError(
            "logit: the trace holds no router logits, which margins are computed from; "
            "record it again with logits=true."
        )
    check_experts(batch.expert_TLK, num_experts=num_experts)
    check_range("domain", batch.domain_T, below=num_domains)
    num_tokens, num_layers, top_k = batch.expert_TLK.shape
    clusters = num_domains * num_groups
    cluster_T = batch.domain_T.astype(np.int64) * num_groups
    cluster_T += group_of_document(batch.document_T, num_groups=num_groups)
    histogram_LKH = np.zeros((num_layers, top_k, len(MARGIN_EDGES) - 1), np.int64)
    sum_CLK = np.zeros((clusters, num_layers, top_k))
    survivor_CLK, alone_CLK = np.zeros((2, clusters, num_layers, top_k), np.int64)
    for start in range(0, num_tokens, _ROWS):
        part = slice(start, start + _ROWS)
        logit_TLE, cluster = batch.logit_TLE[part], cluster_T[part]
        margin_TLK = margins(logit_TLE, top_k=top_k)
        _add_histogram(histogram_LKH, margin_TLK)
        _add_by_cluster(sum_CLK, margin_TLK, cluster)
        if threshold is not None:
            left_TLK = num_survivors(logit_TLE, batch.expert_TLK[part], threshold=threshold)
            _add_by_cluster(survivor_CLK, left_TLK, cluster)
            _add_by_cluster(alone_CLK, left_TLK == 1, cluster)
    return MarginCounts(
        histogram_LKH=histogram_LKH,
        sum_CLK=sum_CLK,
        token_C=np.bincount(cluster_T, minlength=clusters),
        survivor_CLK=survivor_CLK,
        alone_CLK=alone_CLK,
        num_experts=num_experts,
        num_domains=num_domains,
        threshold=threshold,
    )


def quantile_of_margins(histogram: NDArray[np.integer], quantile: float) -> Floats:
    """(..., H) -> (...): the margin below which that part of the tokens lies, in nats.

    Linear within a bin, so right to a bin's width (0.01 below 0.01 nats, then 14 %); the last,
    open bin answers with its lower edge, 20 nats. NaN without a token.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: got {quantile}; it must be 0 to 1.")
    upper = np.cumsum(histogram, axis=-1, dtype=np.float64)
    total = upper[..., -1]
    wanted = quantile * total
    bin_ = np.minimum((upper < wanted[..., None]).sum(axis=-1), histogram.shape[-1] - 1)
    inside = np.take_along_axis(histogram, bin_[..., None], axis=-1)[..., 0].astype(np.float64)
    before = np.take_along_axis(upper, bin_[..., None], axis=-1)[..., 0] - inside
    part = np.divide(wanted - before, inside, out=np.zeros_like(wanted), where=inside > 0)
    low, high = MARGIN_EDGES[bin_], MARGIN_EDGES[bin_ + 1]
    width = np.where(np.isfinite(high), high - low, 0.0)
    return np.where(total > 0, low + part * width, np.nan)


def mean_margin(counts: MarginCounts, *, num_samples: int = 1000, seed: int = 0) -> Interval:
    """(L, K): mean margins in nats, with 95 % intervals over documents."""
    return _interval(counts, counts.sum_CLK, _mean, num_samples=num_samples, seed=seed)


def mean_masked_fraction(
    counts: MarginCounts, *, num_samples: int = 1000, seed: int = 0
) -> Interval:
    """(L, 2): mean over tokens of analysis.sparsemixer_mask.masked_fraction, with intervals."""
    _require_threshold(counts)
    candidates = counts.num_experts - np.arange(NUM_STAGES)

    def statistic(total: Floats, token: Floats) -> Floats:
        return 1.0 - _mean(total, token) / candidates

    return _interval(counts, counts.survivor_CLK, statistic, num_samples=num_samples, seed=seed)


def alone_fraction(counts: MarginCounts, *, num_samples: int = 1000, seed: int = 0) -> Interval:
    """(L, 2): part of the tokens of which one expert alone survives each stage, with intervals.

    Such a choice has weight 1 (at evaluation), and its router logits no gradient.
    """
    _require_threshold(counts)
    return _interval(counts, counts.alone_CLK, _mean, num_samples=num_samples, seed=seed)


def _interval(
    counts: MarginCounts, sums: NDArray, statistic: Statistic, *, num_samples: int, seed: int
) -> Interval:
    stratum_C = np.repeat(np.arange(counts.num_domains), len(sums) // counts.num_domains)
    return bootstrap(
        [sums, counts.token_C], statistic, stratum_C=stratum_C, num_samples=num_samples, seed=seed
    )


def _mean(total: Floats, token: Floats) -> Floats:
    token = np.broadcast_to(token[..., None, None], total.shape)
    return np.divide(total, token, out=np.full_like(total, np.nan), where=token > 0)


def _require_threshold(counts: MarginCounts) -> None:
    if counts.threshold is None:
        raise ValueError(
            "counts: masked experts were not counted; pass threshold=, the router.mask_threshold "
            "of a SparseMixer model, to count_margins."
        )


def _add_histogram(histogram_LKH: Integers, margin_TLK: Floats) -> None:
    # the edges are sorted, so that a bin is found by search; the open ends hold everything
    bin_TLK = np.searchsorted(MARGIN_EDGES, margin_TLK, side="right") - 1
    bins = histogram_LKH.shape[-1]
    np.clip(bin_TLK, 0, bins - 1, out=bin_TLK)
    flat = np.arange(histogram_LKH[..., 0].size).reshape(histogram_LKH.shape[:2]) * bins
    table = np.bincount((bin_TLK + flat).ravel(), minlength=histogram_LKH.size)
    histogram_LKH += table.reshape(histogram_LKH.shape)


def _add_by_cluster(total_CLK: NDArray, value_TLK: NDArray, cluster_T: Integers) -> None:
    # tokens of a document follow each other, so runs of one cluster are added up first
    starts = np.flatnonzero(np.diff(cluster_T, prepend=-1))
    sums = np.add.reduceat(value_TLK, starts, axis=0, dtype=total_CLK.dtype)
    np.add.at(total_CLK, cluster_T[starts], sums)
