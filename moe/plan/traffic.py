"""How many bytes one rank sends in an optimiser step, inside its node and to other nodes.

A ring over n ranks sends (n - 1) / n of a tensor from each rank for a reduce-scatter or an
all-gather, and 2 (n - 1) / n for an all-reduce, the least that is possible (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). Where a group has g
ranks on a node, one of g hops leaves it; NCCL turns the ring for each of its channels, so every
rank sends one in g of its bytes to another node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe.plan.held import flat_elements, held_groups, num_sharing, partition_elements
from moe.plan.layout import Layout

_COUNT_BYTES = 8  # int64
_NUMBER_BYTES = 4  # float32


@dataclass(frozen=True)
class Sent:
    """Bytes of one purpose that a rank sends in an optimiser step."""

    inside: int  # to ranks of its node
    between: int  # to other nodes
    num_calls: int  # collective operations
    overlaps: bool = False  # with computation, as the engine is configured

    @property
    def total(self) -> int:
        return self.inside + self.between


def rank_traffic(layout: Layout) -> dict[str, Sent]:
    """Return what rank 0 sends, by purpose; purposes without a byte left out.

    Routing is taken as uniform: a rank's rows go to all P ranks of its expert group alike.
    """
    table = {
        "gradients, shared": _gradients(layout, is_expert=False),
        "gradients, experts": _gradients(layout, is_expert=True),
        "updated parameters": _updated(layout),
        "gathered parameters": _gathered(layout),
        "expert rows": _rows(layout),
        "expert counts": _counts(layout),
        "balance statistics": _balance(layout),
        "numbers of the step": _numbers(layout),
    }
    return {purpose: sent for purpose, sent in table.items() if sent.num_calls and sent.total}


def _ring(layout: Layout, group: range, num_bytes: int, *, times: int, calls: int = 1) -> Sent:
    """times (n - 1) / n of num_bytes around the group."""
    n = len(group)
    total = -(-times * (n - 1) * num_bytes // n)
    here = layout.neighbours(group, group[0])
    between = 0 if here == n else total // here
    return Sent(total - between, between, calls)


def _gradients(layout: Layout, *, is_expert: bool) -> Sent:
    """ZeRO 0, 1, 2: an all-reduce (2 too: DeepSpeed reduces buckets of several ranks at once, and
    each keeps its part); 3: a reduce-scatter, which gloo makes an all-reduce. ZeRO 0 and 1 once a
    step, 2 and 3 for each micro-batch."""
    stage = layout.zero_stage
    groups = [group for group in held_groups(layout) if group.is_expert == is_expert]
    if not groups:
        return Sent(0, 0, 0)
    ranks = layout.expert_data_group(0) if is_expert else layout.data_group()
    n = len(ranks)
    elements = sum(
        n * partition_elements(layout, group) if stage == 3 else group.total for group in groups
    )
    repeats = layout.num_micro if stage >= 2 else 1
    times = (1 if stage == 3 and layout.is_cuda else 2) * repeats
    sent = _ring(layout, ranks, layout.gradient_bytes * elements, times=times, calls=repeats)
    return Sent(sent.inside, sent.between, sent.num_calls, overlaps=stage == 3)


def _updated(layout: Layout) -> Sent:
    """ZeRO 1 and 2: every rank sends its updated part to all, once a step."""
    if layout.zero_stage not in (1, 2):
        return Sent(0, 0, 0)
    return _sum(
        _ring(
            layout,
            layout.expert_data_group(0) if group.is_expert else layout.data_group(),
            layout.parameter_bytes * flat_elements(layout, group),
            times=1,
        )
        for group in held_groups(layout)
    )


def _gathered(layout: Layout) -> Sent:
    """ZeRO 3: every parameter is gathered for a forward pass, and again for the backward pass, but
    for as many as may be live: those that come last stay, and fetching ahead keeps the number at
    its limit. Recomputation uses those of the backward pass."""
    groups = [group for group in held_groups(layout) if num_sharing(layout, group) > 1]
    if layout.zero_stage != 3 or not groups:
        return Sent(0, 0, 0)
    whole = sum(group.total for group in groups)
    share_again = max(0.0, 1.0 - layout.live_elements / whole)
    made = []
    for group in groups:
        n = num_sharing(layout, group)
        ranks = layout.expert_data_group(0) if group.is_expert else layout.data_group()
        num_bytes = layout.parameter_bytes * n * partition_elements(layout, group)
        num_bytes = int(num_bytes * (1 + share_again))
        calls = layout.num_micro * len(group.sizes) * (2 if share_again else 1)
        made.append(_ring(layout, ranks, num_bytes, times=layout.num_micro, calls=calls))
    sent = _sum(made)
    return Sent(sent.inside, sent.between, sent.num_calls, overlaps=True)


def _rows(layout: Layout) -> Sent:
    """Rows to their experts and back, and their gradients: 4 exchanges a layer, 6 where the
    forward pass runs twice: K T D a (1 - 1 / P) each, with a bytes a number in the products' dtype.
    """
    model, size = layout.model, layout.expert_parallel_size
    if size == 1 or not model.is_sparse:
        return Sent(0, 0, 0)
    passes = 3 if layout.activation_checkpointing else 2
    rows = layout.tokens_of_rank * model.top_k
    num_bytes = 2 * passes * rows * model.hidden_size * layout.product_bytes * model.num_layers
    return _exchange(layout, num_bytes, calls=2 * passes * model.num_layers * layout.num_micro)


def _counts(layout: Layout) -> Sent:
    """E counts to the ranks of the group in every forward pass of a layer."""
    model = layout.model
    if layout.expert_parallel_size == 1 or not model.is_sparse:
        return Sent(0, 0, 0)
    passes = (2 if layout.activation_checkpointing else 1) * model.num_layers * layout.num_micro
    return _exchange(layout, passes * model.num_experts * _COUNT_BYTES, calls=passes)


def _exchange(layout: Layout, num_bytes: int, *, calls: int) -> Sent:
    """num_bytes in equal parts to the ranks of the expert group; its own part stays."""
    size = layout.expert_parallel_size
    here = layout.neighbours(layout.expert_group(0), 0)
    inside, between = num_bytes * (here - 1) // size, num_bytes * (size - here) // size
    return Sent(inside, between, calls)


def _balance(layout: Layout) -> Sent:
    """router.balance_scope=global: E + 2 float32 over all ranks, for each layer (or all together)
    of each micro-batch."""
    model, router = layout.model, layout.router
    if not model.is_sparse or router.balance_scope != "global":
        return Sent(0, 0, 0)
    calls = layout.num_micro * (model.num_layers if router.balance == "per_layer" else 1)
    num_bytes = calls * (model.num_experts + 2) * _NUMBER_BYTES
    return _ring(layout, layout.data_group(), num_bytes, times=2, calls=calls)


def _numbers(layout: Layout) -> Sent:
    """Labels and a hash before the step; losses, entropies and loads of all layers after it."""
    model = layout.model
    num_layers = model.num_layers if model.is_sparse else 0
    after = _NUMBER_BYTES * (3 + num_layers + num_layers * model.num_experts)
    return _ring(layout, layout.data_group(), 2 * _COUNT_BYTES + after, times=2, calls=2)


def _sum(parts: Iterable[Sent]) -> Sent:
    inside = between = calls = 0
    for sent in parts:
        inside, between = inside + sent.inside, between + sent.between
        calls += sent.num_calls
    return Sent(inside, between, calls)
