"""How much a token's expert in one layer says about its expert in another.

Measured as mutual information of the first choices. Expert numbers of two layers have nothing to
do with each other, so a measure must not care about numbering: mutual information does not, and
also sees one expert split into two; a matched overlap would first need the best assignment of
experts and sees one-to-one relations only. First choices, because a table of all K x K choices
measures the agreement of two random picks, which stays below 1 even when both sets are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.adding import Counts
from analysis.batch_checks import check_experts
from analysis.information import entropy, mutual_information
from moe.trace.batch import TraceBatch

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_MIX = np.uint64(0xBF58476D1CE4E5B9)  # of SplitMix64 (Steele et al. 2014), an odd multiplier
_ROWS = 8192  # of one-hot rows multiplied at once: 16 MB at 512 columns


@dataclass(frozen=True, eq=False)
class LayerPairCounts(Counts):
    """First choices of two layers together, over one token in `stride`."""

    joint_LLEE: Integers  # [a, b, i, j]: tokens with first choice i in layer a and j in layer b
    num_tokens: Integers  # () tokens counted
    stride: int


def count_layer_pairs(batch: TraceBatch, *, num_experts: int, stride: int = 1) -> LayerPairCounts:
    """Count one batch; sum over batches with analysis.adding.total or `+`.

    All pairs of layers cost (L E)^2 operations a token: with stride n about one token in n is
    counted, picked by its document and position, so by neither the order nor the batches.
    """
    check_experts(batch.expert_TLK, num_experts=num_experts)
    if stride < 1:
        raise ValueError(f"stride: got {stride}; it must be at least 1.")
    first_TL = batch.expert_TLK[:, :, 0]
    if stride > 1:
        first_TL = first_TL[_is_picked(batch.document_T, batch.position_T, stride=stride)]
    num_tokens, num_layers = first_TL.shape
    width = num_layers * num_experts
    joint = np.zeros((width, width), np.int64)
    column_TL = first_TL + np.arange(num_layers) * num_experts
    for start in range(0, num_tokens, _ROWS):
        part_TL = column_TL[start : start + _ROWS]
        # float32 holds the counts of a few thousand rows exactly, and its product is the fastest
        one_hot = np.zeros((len(part_TL), width), np.float32)
        np.put_along_axis(one_hot, part_TL, 1.0, axis=1)
        joint += (one_hot.T @ one_hot).astype(np.int64)
    joint_LLEE = joint.reshape(num_layers, num_experts, num_layers, num_experts)
    return LayerPairCounts(
        np.ascontiguousarray(joint_LLEE.transpose(0, 2, 1, 3)), np.array(num_tokens), stride
    )


def layer_agreement(joint: ArrayLike, *, is_corrected: bool = True) -> Floats:
    """(..., E, E) -> (...): mutual information over the smaller of both entropies, 0 to 1.

    For LayerPairCounts.joint_LLEE an (L, L) matrix, symmetric, with ones on its diagonal. 0: the
    layers choose independently; 1: the first choice of one layer decides that of the other. NaN
    where a layer always chooses the same expert. is_corrected subtracts what chance alone gives
    at this number of tokens (analysis.information), except from tables with one cell in each row
    and column, which are a renumbering and give exactly 1.
    """
    joint_EE = np.asarray(joint, dtype=np.float64)
    smaller = np.minimum(entropy(joint_EE.sum(axis=-1)), entropy(joint_EE.sum(axis=-2)))
    known = mutual_information(joint_EE, is_corrected=is_corrected)
    cells_X, cells_Y = (joint_EE > 0).sum(axis=-1), (joint_EE > 0).sum(axis=-2)
    is_renumbering = (cells_X.max(axis=-1) <= 1) & (cells_Y.max(axis=-1) <= 1)
    value = np.divide(known, smaller, out=np.full_like(smaller, np.nan), where=smaller > 0)
    return np.where(is_renumbering & (smaller > 0), 1.0, value)


def _is_picked(
    document_T: NDArray[np.integer], position_T: NDArray[np.integer], *, stride: int
) -> NDArray[np.bool_]:
    mixed_T = (document_T.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed_T = (mixed_T ^ (mixed_T >> np.uint64(30))) * _MIX + position_T.astype(np.uint64)
    mixed_T = mixed_T * _MIX
    mixed_T = (mixed_T ^ (mixed_T >> np.uint64(27))) >> np.uint64(16)
    return mixed_T % np.uint64(stride) == 0
