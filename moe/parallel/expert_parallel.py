"""Experts spread over processes: groups, dispatch by uneven exchange, and the local experts.

World ranks i P to (i + 1) P - 1 form an expert group: together they hold every expert once, each of
them E / P in a row, so that with P at most the ranks of a node the exchange stays inside it. Ranks
with the same place in their groups hold the same experts: their gradients are averaged.

Rows are sorted by expert, so the rows for a process are one slice. Counts are exchanged once, then
the rows, without padding; they arrive in the order of processes, each sender's sorted by expert.
The experts' own plan sorts them again as indices, without moving them.
"""

from __future__ import annotations

from typing import NamedTuple

import phi_kernels
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.parallel.collectives import exchange_counts, exchange_rows
from moe.parallel.processes import Processes
from moe.sparse.autocast import in_product_type
from moe.sparse.dispatch import Exchange, ExpertInput
from moe.sparse.experts import GroupedExperts
from moe.sparse.router import Routing


class ExpertGroups(NamedTuple):
    """This process's two groups; size is that of the expert group."""

    size: int
    place: int  # among the processes of the expert group
    expert: dist.ProcessGroup  # holds every expert once
    data: dist.ProcessGroup  # hold the same experts as this process

    @property
    def name(self) -> str:
        """As DeepSpeed names groups of this size."""
        return f"ep_size_{self.size}"

    def held(self, num_experts: int) -> range:
        """The experts of this process."""
        num_held = num_experts // self.size
        return range(self.place * num_held, (self.place + 1) * num_held)


def make_expert_groups(size: int, processes: Processes) -> ExpertGroups:
    """Make this process's two groups of a layout; every process calls this.

    Each waits for its own members only. That cannot end in a circle: all make the expert group
    first, and no process is in two of a kind.
    """
    own = processes.rank
    first, place = own - own % size, own % size
    expert, data = (
        dist.new_group(list(ranks), use_local_synchronization=True)
        for ranks in (range(first, first + size), range(place, processes.world_size, size))
    )
    assert isinstance(expert, dist.ProcessGroup)
    assert isinstance(data, dist.ProcessGroup)
    return ExpertGroups(size, place, expert, data)


class ExpertParallelDispatcher:
    """dispatch and combine of LocalDispatcher, over the processes of an expert group."""

    def __init__(self, groups: ExpertGroups) -> None:
        self._groups = groups

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int
    ) -> tuple[ExpertInput, Exchange | None]:
        """Return the rows that other processes and this one have for this one's experts."""
        size = self._groups.size
        plan = phi_kernels.make_plan(routing.expert_TK, num_experts=num_experts)
        count_PE = routing.count_E.view(size, num_experts // size)
        received_PE = exchange_counts(count_PE, self._groups.expert)
        # syncs: the exchange takes its sizes from the host
        sent_P, received_P = torch.stack([count_PE.sum(1), received_PE.sum(1)]).tolist()
        # rounded before they travel, as the experts would round them: half the bytes
        rows_ND = phi_kernels.gather_rows(in_product_type(x_TD), plan)
        rows_RD = exchange_rows(
            rows_ND, sent_P=sent_P, received_P=received_P, group=self._groups.expert
        )
        expert_R = _repeated_experts(received_PE, num_rows=len(rows_RD))
        received_plan = phi_kernels.make_plan(expert_R[:, None], num_experts=received_PE.shape[1])
        weight_R1 = routing.weight_TK.new_ones(len(rows_RD), 1)  # weights stay with their tokens
        return (
            ExpertInput(rows_RD, weight_R1, received_plan),
            Exchange(plan, sent_P, received_P),
        )

    def combine(self, y_RD: Tensor, routing: Routing, exchange: Exchange | None) -> Tensor:
        """Send every answer back to its token's process; weight and sum there."""
        assert exchange is not None
        y_ND = exchange_rows(
            y_RD,
            sent_P=exchange.received_P,
            received_P=exchange.sent_P,
            group=self._groups.expert,
        )
        return phi_kernels.combine_rows(y_ND, routing.weight_TK, exchange.plan)


def _repeated_experts(count_PE: Tensor, *, num_rows: int) -> Tensor:
    """int64 (R,): the expert of each received row; a sender's rows are sorted by expert."""
    expert_PE = torch.arange(count_PE.shape[1], device=count_PE.device).expand_as(count_PE)
    return expert_PE.flatten().repeat_interleave(count_PE.flatten(), output_size=num_rows)


def bytes_sent(exchange: Exchange, groups: ExpertGroups, *, width: int, element_size: int) -> int:
    """Bytes that leave this process in one dispatch: rows for others, nothing else.

    combine sends as many as it received; the backward pass repeats both the other way round.
    """
    own = exchange.sent_P[groups.place]
    return (sum(exchange.sent_P) - own) * width * element_size


def mark_held_apart(model: nn.Module, groups: ExpertGroups) -> None:
    """Mark the parameters that differ between the processes of an expert group, for the engines.

    DeepSpeed reads these attributes: such a gradient is reduced over the processes that hold the
    same experts, and partitioned over them.
    """
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            for parameter in module.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = groups.name  # type: ignore[attr-defined]
                parameter.ds_zero_partition_group_name = groups.name  # type: ignore[attr-defined]
                parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]


def is_held_apart(parameter: Tensor) -> bool:
    """Whether the processes of an expert group hold different ones of this parameter."""
    return not getattr(parameter, "allreduce", True)
