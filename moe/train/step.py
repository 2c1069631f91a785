"""The loss of one micro-batch: cross-entropy, balance and z terms, and what was routed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import RouterConfig
from moe.data.packing import IGNORED, Batch
from moe.model.transformer import Output
from moe.sparse.losses import Reduce, load_balance, load_balance_pooled, z_loss
from moe.sparse.noise import token_keys
from moe.sparse.router import Routing
from moe.train.cross_entropy import cross_entropy


@dataclass(frozen=True)
class LossTerms:
    """One micro-batch's terms; all detached but `total`, whose mean over ranks is minimised."""

    total: Tensor  # scalar, float32
    cross_entropy_sum: Tensor  # nats over this micro-batch's labels
    balance: Tensor  # before its coefficient; mean over layers
    z: Tensor  # the same
    load_LE: Tensor  # float32, routed rows of each expert, padding excluded; (0, 0) when dense
    entropy_L: Tensor  # mean entropy of the router's softmax, nats


def loss_terms(
    forward: Callable[..., object],
    batch: Batch,
    *,
    router: RouterConfig,
    seed: int,
    num_labels: Tensor,
    num_ranks: int,
    num_micro: int,
    precision: torch.dtype,
    reduce: Reduce,
    on_routing: Callable[[tuple[Routing, ...]], object] | None = None,
) -> LossTerms:
    """Run forward on the batch and weigh the terms so that steps add up.

    Cross-entropy is divided by num_labels, the labels of the whole step over all ranks, so windows
    with few labels do not count more than their labels; balance and z are means over micro-batches.
    on_routing is told of each layer's routing.
    """
    device = batch.tokens.device
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        output = forward(
            batch.tokens,
            position_BS=batch.position,
            document_BS=batch.document,
            key_BS=token_keys(seed, batch.sample, seq_len=batch.tokens.shape[1]),
        )
    assert isinstance(output, Output)
    if on_routing is not None:
        on_routing(output.routings)
    loss_T = cross_entropy(output.logits.flatten(0, 1), batch.labels.flatten(), ignored=IGNORED)
    cross_entropy_sum = loss_T.sum()
    valid_T = (batch.document >= 0).flatten()
    balance, z = routing_losses(output.routings, valid_T, router=router, reduce=reduce)
    auxiliary = router.balance_coef * balance + router.z_coef * z
    total = cross_entropy_sum * (num_ranks / num_labels) + auxiliary / num_micro
    load_LE, entropy_L = routing_summary(output.routings, valid_T)
    return LossTerms(
        total, cross_entropy_sum.detach(), balance.detach(), z.detach(), load_LE, entropy_L
    )


def rows_hash(batch: Batch) -> int:
    """Return the sum over rows of the CRC-32 of (sample number, token ids); batch is on the CPU.

    A sum, so the hash of a step does not depend on how ranks and micro-batches divide its rows.
    """
    numbered = torch.cat([batch.sample[:, None], batch.tokens], dim=1).numpy()
    return sum(zlib.crc32(row) for row in numbered)


def routing_losses(
    routings: tuple[Routing, ...], valid_T: Tensor, *, router: RouterConfig, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """Return (balance, z), each a mean over layers, 0 for a dense model."""
    if not routings:
        zero = torch.zeros((), device=valid_T.device)
        return zero, zero
    over_ranks = reduce if router.balance_scope == "global" else None
    if router.balance == "pooled":
        balance = load_balance_pooled(routings, valid_T, reduce=over_ranks)
    else:
        layers = [load_balance(routing, valid_T, reduce=over_ranks) for routing in routings]
        balance = torch.stack(layers).mean()
    return balance, torch.stack([z_loss(routing, valid_T) for routing in routings]).mean()


@torch.no_grad()
def routing_summary(routings: tuple[Routing, ...], valid_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return load_LE (routed rows of real tokens, float32) and entropy_L (nats)."""
    if not routings:
        return torch.zeros(0, 0, device=valid_T.device), torch.zeros(0, device=valid_T.device)
    loads, entropies = [], []
    weight_T = valid_T.float()
    for routing in routings:
        num_experts, top_k = routing.logit_TE.shape[1], routing.expert_TK.shape[1]
        rows = torch.zeros(num_experts, device=valid_T.device)
        rows.index_add_(0, routing.expert_TK.flatten(), weight_T.repeat_interleave(top_k))
        log_p_TE = routing.logit_TE.log_softmax(dim=-1)
        entropy_T = -(log_p_TE.exp() * log_p_TE).sum(dim=-1)
        loads.append(rows)
        entropies.append((entropy_T * weight_T).sum() / weight_T.sum().clamp(min=1))
    return torch.stack(loads), torch.stack(entropies)
