"""How many tokens of each domain and group of documents chose each expert of each layer.

The table that load, balance and domain specialisation are computed from, and what their intervals
resample. Its size does not depend on the number of tokens or documents: documents are put into a
fixed number of groups by their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.adding import Counts
from analysis.batch_checks import check_experts, check_range
from moe.trace.batch import TraceBatch

Integers = NDArray[np.int64]

NUM_GROUPS = 512  # an interval from 500 clusters is within about 3 % of one from all (1/sqrt(2n))
# 2**64 over the golden ratio: multiples of it fill a circle evenly (Knuth, volume 3, section 6.4)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class RoutingCounts(Counts):
    """Choices of experts and tokens; D domains, G groups of documents within each domain."""

    choice_LDGE: Integers  # of the first num_choices of each token
    token_DG: Integers
    choice_LKE: Integers  # by order of choice, all K
    weight_LE: NDArray[np.float64]  # sum of the weights given to each expert, all K choices
    num_choices: int

    @property
    def load_LE(self) -> Integers:
        """(L, E): choices of each expert; a layer sums to num_choices * tokens."""
        return self.choice_LDGE.sum(axis=(1, 2))

    @property
    def load_LDE(self) -> Integers:
        """(L, D, E): choices of each expert by tokens of each domain."""
        return self.choice_LDGE.sum(axis=2)

    @property
    def token_D(self) -> Integers:
        """(D,): tokens of each domain."""
        return self.token_DG.sum(axis=1)

    @property
    def num_tokens(self) -> int:
        """Tokens counted, each once whatever the number of layers."""
        return int(self.token_DG.sum())


def count_routing(
    batch: TraceBatch,
    *,
    num_experts: int,
    num_domains: int,
    num_groups: int = NUM_GROUPS,
    num_choices: int | None = None,
) -> RoutingCounts:
    """Count one batch; sum over batches with analysis.adding.total or `+`.

    num_choices counts the first so many choices of each token in choice_LDGE (all K when left
    out): 1 asks what the strongest expert is, K what the load is. Raises DataError for experts or
    domains outside their range.
    """
    expert_TLK = batch.expert_TLK
    check_experts(expert_TLK, num_experts=num_experts)
    check_range("domain", batch.domain_T, below=num_domains)
    _, num_layers, top_k = expert_TLK.shape
    counted = top_k if num_choices is None else num_choices
    if not 1 <= counted <= top_k:
        raise ValueError(f"num_choices: got {counted}; it must be 1 to {top_k}, or left out.")
    cells = num_domains * num_groups
    cell_T = batch.domain_T.astype(np.int64) * num_groups
    cell_T += group_of_document(batch.document_T, num_groups=num_groups)
    row_T = cell_T * num_experts
    choice_LCE = np.zeros((num_layers, cells, num_experts), np.int64)
    choice_LKE = np.zeros((num_layers, top_k, num_experts), np.int64)
    weight_LE = np.zeros((num_layers, num_experts), np.float64)
    for layer in range(num_layers):
        for k in range(top_k):
            expert_T = expert_TLK[:, layer, k].astype(np.int64)
            weight_T = batch.weight_TLK[:, layer, k]
            weight_LE[layer] += np.bincount(expert_T, weight_T, minlength=num_experts)
            if k >= counted:
                choice_LKE[layer, k] = np.bincount(expert_T, minlength=num_experts)
                continue
            expert_T += row_T
            table_CE = np.bincount(expert_T, minlength=cells * num_experts).reshape(cells, -1)
            choice_LCE[layer] += table_CE
            choice_LKE[layer, k] = table_CE.sum(axis=0)
    return RoutingCounts(
        choice_LDGE=choice_LCE.reshape(num_layers, num_domains, num_groups, num_experts),
        token_DG=np.bincount(cell_T, minlength=cells).reshape(num_domains, num_groups),
        choice_LKE=choice_LKE,
        weight_LE=weight_LE,
        num_choices=counted,
    )


def group_of_document(document_T: NDArray[np.integer], *, num_groups: int) -> Integers:
    """(T,) document numbers -> (T,) groups 0 .. num_groups - 1; a document is in one group.

    Documents are independent draws, so any fixed grouping of them is too, and a bootstrap over
    groups is valid; it has the spread of one over documents while groups are many. Numbers in a
    row or at equal distances (a domain that is every eighth document) spread evenly over the
    groups, which their remainder would not do.
    """
    spread_T = (document_T.astype(np.uint64) * _GOLDEN) >> np.uint64(32)
    return ((spread_T * np.uint64(num_groups)) >> np.uint64(32)).astype(np.int64)
