"""Rows to and from other processes, with gradients that take the way back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def exchange_counts(count_PE: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return (P, E): row p is what process p counted for this one. One small exchange."""
    received_PE = torch.empty_like(count_PE)
    dist.all_to_all_single(received_PE, count_PE.contiguous(), group=group)
    return received_PE


def exchange_rows(
    rows_ND: Tensor, *, sent_P: list[int], received_P: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send the first sent_P[0] rows to process 0 and so on; return (sum(received_P), D).

    What comes is in the order of processes. No padding: exactly these rows travel, those for this
    process itself not at all. The gradient is the opposite exchange.
    """
    return _ExchangeRows.apply(rows_ND, sent_P, received_P, group)  # type: ignore[return-value]


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, sent_P, received_P, group):
        ctx.sent_P, ctx.received_P, ctx.group = sent_P, received_P, group
        return _exchange(rows_ND, sent_P, received_P, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return _exchange(grads[0], ctx.received_P, ctx.sent_P, ctx.group), None, None, None


def _exchange(
    rows_ND: Tensor, sent_P: list[int], received_P: list[int], group: dist.ProcessGroup
) -> Tensor:
    received_RD = rows_ND.new_empty(sum(received_P), *rows_ND.shape[1:])
    dist.all_to_all_single(received_RD, rows_ND.contiguous(), received_P, sent_P, group=group)
    return received_RD
