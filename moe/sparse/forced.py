"""What it means to force a routing: recorded experts and weights instead of the router's choice.

For replaying a trace, for benchmarks with real skew, and for experiments: weights of 0 take an
expert's answer away. A forced weight is a constant, so a forced token gives the router no gradient
through its weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.sparse.router import Routing


class Forced(NamedTuple):
    """The choice of each token of one layer; a token whose experts are negative stays free."""

    expert_TK: Tensor  # int64, below the number of experts (not checked: that would wait for a GPU)
    weight_TK: Tensor  # multiplies the expert's output


def force(routing: Routing, forced: Forced) -> Routing:
    """The routing with the forced tokens' experts, weights and counts; logits stay the router's.

    Raises ValueError where forced is not of routing's shape (T, K).
    """
    shape = tuple(routing.expert_TK.shape)
    for name, values in zip(Forced._fields, forced, strict=True):
        if tuple(values.shape) != shape:
            raise ValueError(f"forced.{name}: has shape {tuple(values.shape)}; it must be {shape}")
    is_free_T1 = forced.expert_TK[:, :1] < 0
    expert_TK = torch.where(is_free_T1, routing.expert_TK, forced.expert_TK)
    forced_weight_TK = forced.weight_TK.to(routing.weight_TK.dtype)
    weight_TK = torch.where(is_free_T1, routing.weight_TK, forced_weight_TK)
    count_E = torch.zeros_like(routing.count_E)
    count_E.index_add_(0, expert_TK.flatten(), torch.ones_like(expert_TK).flatten())
    return Routing(weight_TK, expert_TK, routing.logit_TE, count_E)


def last_places(forced: Forced, num_places: int, *, num_rows: int) -> Forced:
    """The part of forced that is of the last num_places of each of num_rows rows."""
    expert, weight = (v.unflatten(0, (num_rows, -1))[:, -num_places:].flatten(0, 1) for v in forced)
    return Forced(expert, weight)
