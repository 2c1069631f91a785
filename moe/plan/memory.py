"""How many bytes one rank needs at the fullest moment of a step, and for what.

n ranks share the parameters outside the experts (S elements), m = n / P those of the experts that
a rank holds (X elements). p is the bytes of a parameter: 4, or 2 with parameters in bfloat16. Adam
has two moments of float32. What is DeepSpeed's was read in its version 0.19.8, runtime/zero/.

| | ZeRO 0 | ZeRO 1, 2 | ZeRO 3 |
|---|---|---|---|
| parameters | p (S + X) | p (S + X) | p (S / n + X / m), and those gathered |
| masters | 4 (S + X) with bfloat16 | 4 (S / n + X / m), float32 too | as 1, 2 with bfloat16 |
| moments | 8 (S + X) | 8 (S / n + X / m) | 8 (S / n + X / m) |
| gradients | p (S + X) | see gradient_bytes | p (S / n + X / m), and those not reduced |

ZeRO 1 and 2 clone their part of the parameters as masters also where it is float32 already; ZeRO 3
then uses the same memory. Parts are rounded up (moe/plan/held.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.plan.activations import backward_buffers, kept_activations, loss_buffers
from moe.plan.held import (
    flat_elements,
    held_groups,
    num_held,
    num_sharing,
    partition_elements,
    touched_elements,
)
from moe.plan.layout import Layout

# DeepSpeed's defaults, in elements: of a gradient bucket (reduce_bucket_size), of gathered
# parameters that stay (stage3_max_live_parameters)
BUCKET_ELEMENTS = 500_000_000
MOST_LIVE_ELEMENTS = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, on its GPU unless said otherwise."""

    state: dict[str, int]  # there from the first step to the last
    activations: dict[str, int]  # kept of one micro-batch
    moments: dict[str, int]  # beside the state, at each moment of a step that can be the fullest
    host: int  # in the CPU's memory, for an offloaded optimiser

    @property
    def total(self) -> int:
        """At the fullest moment."""
        return sum(self.state.values()) + max(self.moments.values())

    @property
    def fullest(self) -> str:
        """The name of that moment."""
        return max(self.moments, key=lambda name: self.moments[name])


def rank_memory(layout: Layout) -> Memory:
    """Return what one rank needs.

    The moments: when the backward pass of the last micro-batch begins (all activations, the
    logits' gradient, gradients held from micro-batches before), when it ends (all gradients, the
    first layer's activations), and the optimiser's step.
    """
    state, host = state_bytes(layout)
    activations = kept_activations(layout)
    total = sum(activations.values())
    held, ended, step = gradient_bytes(layout)
    one_layer = total // layout.model.num_layers
    if layout.activation_checkpointing:
        one_layer = sum(size for part, size in activations.items() if part.endswith("one layer"))
        first = total - one_layer + loss_buffers(layout)
    else:
        first = total + loss_buffers(layout)
    moments = {
        "backward begins": held + first,
        "backward ends": ended + one_layer + backward_buffers(layout),
        "optimiser's step": step,
    }
    return Memory(state, activations, moments, host)


def state_bytes(layout: Layout) -> tuple[dict[str, int], int]:
    """Return (bytes by kind on the GPU, bytes on the host), as in this file's table."""
    p, stage = layout.parameter_bytes, layout.zero_stage
    groups = held_groups(layout)
    parts = sum(partition_elements(layout, group) for group in groups)
    if stage in (1, 2):
        parameters = p * sum(flat_elements(layout, group) for group in groups)
    else:
        parameters = p * parts
    has_masters = stage in (1, 2) or layout.bf16_parameters or layout.offload_optimizer
    optimiser = {"masters": 4 * parts if has_masters else 0, "Adam's moments": 8 * parts}
    state = {"parameters": parameters}
    if stage == 3:
        state["gathered parameters"] = p * gathered_elements(layout)
    host = 0
    if layout.offload_optimizer:
        host = sum(optimiser.values()) + 4 * parts  # its gradients are there too
    else:
        state |= optimiser
    state["gradient bucket"] = _bucket_bytes(layout)
    return {kind: size for kind, size in state.items() if size}, host


def gathered_elements(layout: Layout) -> int:
    """Elements of whole parameters that ZeRO 3 has at a time: all of them up to its limit, and
    at least the largest one."""
    sizes = [size for group in held_groups(layout) for size in group.sizes]
    return min(sum(sizes), max(MOST_LIVE_ELEMENTS, *sizes))


def _bucket_bytes(layout: Layout) -> int:
    """ZeRO 1 to 3 copy gradients to one buffer before they are reduced."""
    if layout.zero_stage == 0:
        return 0
    return layout.gradient_bytes * BUCKET_ELEMENTS


def gradient_bytes(layout: Layout) -> tuple[int, int, int]:
    """Return the bytes of gradients (held from earlier micro-batches, when the backward pass
    ends, in the optimiser's step).

    - ZeRO 0: p (S + X) all along.
    - ZeRO 1: the same, until they are reduced bucket by bucket after the last backward pass; then
      those of the whole parameters that this rank's part touches, and its part in float32.
    - ZeRO 2: after every backward pass those of the touched parameters; held ones and new ones.
    - ZeRO 3: this rank's parts; at the end of the backward pass also what waits in the bucket.
    A flattened copy of the bucket is reduced, so as many bytes again while that lasts.
    """
    p, stage = layout.gradient_bytes, layout.zero_stage
    groups = held_groups(layout)
    whole = p * num_held(layout)
    accumulates = layout.num_micro > 1
    if stage == 0:
        return whole if accumulates else 0, whole, whole
    copy = p * min(BUCKET_ELEMENTS, max(group.total for group in groups))
    parts = sum(partition_elements(layout, group) for group in groups)
    if stage == 3:
        return p * parts, p * parts + copy, p * parts + 4 * _largest_part(layout)
    touched = p * sum(touched_elements(layout, group) for group in groups)
    step = touched + 4 * _largest_part(layout)
    if stage == 1:
        return whole if accumulates else 0, whole + copy, step
    return touched if accumulates else 0, (2 if accumulates else 1) * touched + copy, step


def _largest_part(layout: Layout) -> int:
    return max(partition_elements(layout, group) for group in held_groups(layout))


def sharing_words(layout: Layout) -> str:
    """How many ranks share a parameter, in words."""
    shared = {num_sharing(layout, group) for group in held_groups(layout)}
    return " and ".join(str(number) for number in sorted(shared, reverse=True))
