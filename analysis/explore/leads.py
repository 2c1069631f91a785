"""How far ahead an expert was where it was a token's first choice, by expert.

In nats of router logits where the trace has them (analysis.margins, margin 0), otherwise the first
choice's weight less the second's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.adding import Counts
from analysis.batch_checks import check_experts
from analysis.margins import margins
from moe.trace.batch import Layout, TraceBatch


@dataclass(frozen=True, eq=False)
class LeadCounts(Counts):
    """Sums over the tokens whose first choice an expert was."""

    lead_LE: NDArray[np.float64]
    token_LE: NDArray[np.int64]

    @property
    def mean_LE(self) -> NDArray[np.float64]:
        """(L, E): mean lead; NaN for an expert that was no token's first choice."""
        nothing = np.full(self.lead_LE.shape, np.nan)
        return np.divide(self.lead_LE, self.token_LE, out=nothing, where=self.token_LE > 0)


def lead_unit(layout: Layout) -> str | None:
    """What leads of such a trace are measured in; None where it says nothing of them."""
    if layout.has_logits and layout.num_experts > 1:
        return "nats of logits"
    return "weight" if layout.top_k > 1 else None


def count_leads(batch: TraceBatch, *, num_experts: int) -> LeadCounts:
    """Count one batch, of logits where it has them, of weights otherwise (K at least 2)."""
    check_experts(batch.expert_TLK, num_experts=num_experts)
    num_layers = batch.expert_TLK.shape[1]
    lead_LE = np.zeros((num_layers, num_experts))
    token_LE = np.zeros((num_layers, num_experts), np.int64)
    for layer in range(num_layers):
        first_T = batch.expert_TLK[:, layer, 0].astype(np.int64)
        if batch.logit_TLE is not None:
            lead_T = margins(batch.logit_TLE[:, layer], top_k=1)[:, 0]
        else:
            weight_TK = batch.weight_TLK[:, layer]
            lead_T = weight_TK[:, 0].astype(np.float64) - weight_TK[:, 1]
        lead_LE[layer] = np.bincount(first_T, lead_T, minlength=num_experts)
        token_LE[layer] = np.bincount(first_T, minlength=num_experts)
    return LeadCounts(lead_LE, token_LE)
