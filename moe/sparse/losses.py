"""Losses on routing: pure functions of Routing, with padding excluded.

valid_T (T,) bool marks real tokens; None means all. `reduce` sums a tensor over the data-parallel
ranks (identity on one process), so that this file knows nothing of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moe.sparse.router import Routing

Reduce = Callable[[Tensor], Tensor]


def load_balance(
    routing: Routing, valid_T: Tensor | None = None, *, reduce: Reduce | None = None
) -> Tensor:
    """E * sum_e f_e P_e of one layer; a scalar, K (2 for top 2) when perfectly balanced.

    f_e: choices of expert e per token, from the experts really used (sampled ones when sampled).
    P_e: mean full softmax probability, carries the gradient. GRIN (arXiv 2409.12136) section 3.3.
    With reduce, f counts over all ranks, and the mean over ranks of the returned values is the
    loss of the union of their tokens, whatever the number of real tokens of each rank.
    """
    if valid_T is None:
        return _balance(routing.count_E, routing.logit_TE, None, reduce)
    chosen_TE = _hits(routing.expert_TK, routing.logit_TE.shape[1])
    count_E = (chosen_TE * valid_T[:, None]).sum(dim=0)
    return _balance(count_E, routing.logit_TE, valid_T, reduce)


def load_balance_pooled(
    routings: Sequence[Routing], valid_T: Tensor | None = None, *, reduce: Reduce | None = None
) -> Tensor:
    """The loss of transformers' load_balancing_loss_func: all layers pooled, plain top k counted.

    f_e counts the plain top k of the logits, not the experts used; both are equal for topk.
    """
    logit_TE = torch.cat([routing.logit_TE for routing in routings])
    top_k = routings[0].expert_TK.shape[1]
    chosen_TE = _hits(logit_TE.detach().topk(top_k, dim=-1).indices, logit_TE.shape[1])
    pooled_T = None if valid_T is None else valid_T.repeat(len(routings))
    if pooled_T is not None:
        chosen_TE = chosen_TE * pooled_T[:, None]
    return _balance(chosen_TE.sum(dim=0), logit_TE, pooled_T, reduce)


def z_loss(routing: Routing, valid_T: Tensor | None = None) -> Tensor:
    """Mean over real tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    square_T = routing.logit_TE.logsumexp(dim=-1).square()
    if valid_T is None:
        return square_T.mean()
    weight_T = valid_T.to(square_T.dtype)
    return (square_T * weight_T).sum() / weight_T.sum().clamp(min=1)


def _hits(expert_TK: Tensor, num_experts: int) -> Tensor:
    return functional.one_hot(expert_TK, num_experts).sum(dim=1)


def _balance(
    count_E: Tensor, logit_TE: Tensor, valid_T: Tensor | None, reduce: Reduce | None
) -> Tensor:
    """count_E (E,): choices of each expert by this rank's real tokens."""
    probability_TE = logit_TE.softmax(dim=-1)
    weight_T = torch.ones_like(logit_TE[:, 0]) if valid_T is None else valid_T.to(logit_TE.dtype)
    count_E = count_E.to(logit_TE.dtype)
    num_tokens, num_ranks = weight_T.sum(), torch.ones((), device=logit_TE.device)
    if reduce is not None:
        totals = reduce(torch.cat([count_E, torch.stack([num_tokens, num_ranks])]))
        count_E, num_tokens, num_ranks = totals[:-2], totals[-2], totals[-1]
    num_tokens = num_tokens.clamp(min=1)
    fraction_E = (count_E / num_tokens).detach()
    # the sum over this rank's tokens times the number of ranks: its mean over ranks is P_e
    mean_E = (probability_TE * weight_T[:, None]).sum(dim=0) * num_ranks / num_tokens
    return logit_TE.shape[1] * (fraction_E * mean_E).sum()
