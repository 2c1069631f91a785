"""How many of a token's experts two checkpoints share: router saturation and stability.

Router saturation of step t is the overlap with the last checkpoint (OLMoE, arXiv 2409.02060,
section 5). Between two runs expert numbers mean nothing: renumber one by best_renumbering first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.adding import Counts
from analysis.aligned import check_same_tokens
from analysis.assignment import best_assignment
from analysis.batch_checks import check_experts, check_range
from analysis.bootstrap import Interval, bootstrap
from analysis.routing_counts import NUM_GROUPS, group_of_document
from moe.trace.batch import TraceBatch

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class OverlapCounts(Counts):
    """Tokens by the number of experts that both checkpoints chose; H = 0 .. K of them.

    C clusters, each a group of documents of one domain (domain * G + group).
    """

    shared_CLH: Integers
    same_first_CL: Integers  # tokens with the same first choice
    token_C: Integers
    joint_LEE: Integers  # [i, j]: tokens that chose i in one and j in two, among all K
    num_domains: int


def count_overlap(
    one: TraceBatch,
    two: TraceBatch,
    *,
    num_experts: int,
    num_domains: int,
    num_groups: int = NUM_GROUPS,
    new_number_LE: NDArray[np.integer] | None = None,
) -> OverlapCounts:
    """Count a pair of batches of the same tokens (analysis.aligned); sum with total or `+`.

    new_number_LE renumbers the experts of `two` first (best_renumbering). Raises DataError where
    the tokens differ, ValueError where layers or choices do.
    """
    check_same_tokens(one, two)
    if one.expert_TLK.shape != two.expert_TLK.shape:
        raise ValueError(
            f"expert_TLK: shapes {one.expert_TLK.shape} and {two.expert_TLK.shape}; both "
            "checkpoints must have as many sparse layers and choices a token."
        )
    for batch in (one, two):
        check_experts(batch.expert_TLK, num_experts=num_experts)
    check_range("domain", one.domain_T, below=num_domains)
    num_tokens, num_layers, top_k = one.expert_TLK.shape
    clusters = num_domains * num_groups
    cluster_T = one.domain_T.astype(np.int64) * num_groups
    cluster_T += group_of_document(one.document_T, num_groups=num_groups)
    shared_LCH = np.zeros((num_layers, clusters, top_k + 1), np.int64)
    same_first_LC = np.zeros((num_layers, clusters), np.int64)
    joint_LEE = np.zeros((num_layers, num_experts, num_experts), np.int64)
    for layer in range(num_layers):
        one_KT = [one.expert_TLK[:, layer, k].astype(np.int64) for k in range(top_k)]
        two_KT = [two.expert_TLK[:, layer, k].astype(np.int64) for k in range(top_k)]
        if new_number_LE is not None:
            two_KT = [new_number_LE[layer][expert_T] for expert_T in two_KT]
        shared_T = np.zeros(num_tokens, np.int64)
        for one_T in one_KT:
            for two_T in two_KT:
                shared_T += one_T == two_T
                table = np.bincount(one_T * num_experts + two_T, minlength=num_experts**2)
                joint_LEE[layer] += table.reshape(num_experts, num_experts)
        table = np.bincount(cluster_T * (top_k + 1) + shared_T, minlength=clusters * (top_k + 1))
        shared_LCH[layer] = table.reshape(clusters, top_k + 1)
        is_same_T = one_KT[0] == two_KT[0]
        same_first_LC[layer] = np.bincount(cluster_T[is_same_T], minlength=clusters)
    return OverlapCounts(
        shared_CLH=np.ascontiguousarray(shared_LCH.swapaxes(0, 1)),
        same_first_CL=np.ascontiguousarray(same_first_LC.T),
        token_C=np.bincount(cluster_T, minlength=clusters),
        joint_LEE=joint_LEE,
        num_domains=num_domains,
    )


def saturation(shared: ArrayLike) -> Floats:
    """(..., K + 1) -> (...): mean over tokens of the shared experts over K, 0 to 1.

    OLMoE's router saturation when one of the checkpoints is the last. For two choices that know
    nothing of each other it is chance_saturation, K / E at balanced load; not 0.
    """
    return _mean_of(shared, np.arange(_top_k(shared) + 1) / _top_k(shared))


def jaccard(shared: ArrayLike) -> Floats:
    """(..., K + 1) -> (...): mean over tokens of shared experts over all that either chose, 0 to 1.

    With n shared it is n / (2K - n): 1/3, not 1/2, where two checkpoints share one of two.
    """
    shared_H = np.arange(_top_k(shared) + 1)
    return _mean_of(shared, shared_H / (2 * _top_k(shared) - shared_H))


def overlap_interval(
    counts: OverlapCounts,
    metric: Callable[[ArrayLike], Floats],
    *,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """(L,): saturation or jaccard of all tokens by layer, with intervals over documents."""
    num_domains = counts.num_domains
    stratum_C = np.repeat(np.arange(num_domains), len(counts.token_C) // num_domains)
    return bootstrap(
        [counts.shared_CLH],
        metric,
        stratum_C=stratum_C,
        num_samples=num_samples,
        level=level,
        seed=seed,
    )


def chance_saturation(joint: ArrayLike, *, top_k: int) -> Floats:
    """(..., E, E) -> (...): saturation of two independent routers with the same loads, K/E or more.

    Sum over experts of P(one chooses e) P(two chooses e), over K.
    """
    joint_EE = np.asarray(joint, dtype=np.float64)
    total = joint_EE.sum(axis=(-1, -2))
    same = (joint_EE.sum(axis=-1) * joint_EE.sum(axis=-2)).sum(axis=-1)
    square = total * total
    share = np.divide(same, square, out=np.full_like(total, np.nan), where=square > 0)
    return top_k * share


def best_renumbering(joint: ArrayLike) -> Integers:
    """(L, E, E) -> (L, E): for each expert of `two` the number under which both overlap most.

    Maximises saturation exactly (it is linear in the joint table). Fitted to these tokens, so the
    overlap after it is above chance even for unrelated routers: judge it on other tokens than the
    ones it was fitted to, or against the best renumbering of shuffled documents.
    """
    joint_LEE = np.asarray(joint)
    if joint_LEE.ndim != 3:
        raise ValueError(f"joint: got shape {joint_LEE.shape}; it must be (L, E, E).")
    return np.stack([best_assignment(joint_EE.T) for joint_EE in joint_LEE])


def _top_k(shared: ArrayLike) -> int:
    return np.shape(shared)[-1] - 1


def _mean_of(shared: ArrayLike, value_H: Floats) -> Floats:
    shared_H = np.asarray(shared, dtype=np.float64)
    total = shared_H.sum(axis=-1)
    return np.divide(shared_H @ value_H, total, out=np.full_like(total, np.nan), where=total > 0)
