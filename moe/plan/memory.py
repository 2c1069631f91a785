"""How many bytes one rank needs at the fullest moment of a step, and for what.

n ranks share the parameters outside the experts (S elements), m = n / P those of the experts that
a rank holds (X elements). p is the bytes of a parameter: 4, or 2 with parameters in bfloat16.
Gradients are added up and reduced in float32. What is DeepSpeed's was read in its version 0.19.8
(runtime/zero/, runtime/bf16_optimizer.py) and measured (launch/measure_scaling.py).

| | ZeRO 0 | ZeRO 1, 2 | ZeRO 3 |
|---|---|---|---|
| parameters | 4 (S + X) | p (S + X) | p (S / n + X / m) |
| masters, float32 | none | 4 (S / n + X / m) | 4 (S / n + X / m) |
| Adam's moments | 8 (S + X) | 8 (S / n + X / m) | 8 (S / n + X / m) |
| gradients that stay | none | none; with bfloat16 and ZeRO 1 4 (S + X) | 4 (S / n + X / m) |
| gradient bucket | none | 500 million elements (not with bfloat16 and ZeRO 1) | the same |

ZeRO 1 to 3 copy their part of the parameters as masters also where it is float32 already. Parts
are rounded up (moe/plan/held.py). An offloaded optimiser has masters, moments and gradients of its
part in the CPU's memory.
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

    The moments of a step: the forward pass ends, the last backward pass begins (all activations,
    the logits' gradient, gradients held from earlier micro-batches), it ends (the first layer's
    activations, all gradients), gradients are reduced, the optimiser steps.
    """
    activations = kept_activations(layout)
    state, host = state_bytes(layout)
    total = sum(activations.values())
    if layout.activation_checkpointing:
        layer = sum(size for part, size in activations.items() if part.endswith("one layer"))
        total -= layer  # is made in the backward pass only
    else:
        layer = total // layout.model.num_layers
    gradients = gradient_bytes(layout)
    live = layout.parameter_bytes * live_elements(layout)
    moments = {
        "forward ends": gradients.held + live + _gather_buffer(layout) + total,
        "backward begins": gradients.held + live + total + loss_buffers(layout),
        "backward ends": gradients.ended + layer + backward_buffers(layout),
        "gradients are reduced": gradients.reduced + int(total * gradients.share_left),
        "optimiser steps": gradients.step,
    }
    if layout.activation_checkpointing:
        # the last layer is computed again when the logits' gradient is done
        moments["backward begins"] += max(0, layer - loss_buffers(layout))
    return Memory(state, activations, moments, host)


def state_bytes(layout: Layout) -> tuple[dict[str, int], int]:
    """Return (bytes by kind on the GPU, bytes on the host), as in this file's table."""
    p, stage, groups = layout.parameter_bytes, layout.zero_stage, held_groups(layout)
    parts = sum(partition_elements(layout, group) for group in groups)
    flat = sum(flat_elements(layout, group) for group in groups)
    state = {"parameters": p * (flat if stage in (1, 2) else parts)}
    optimiser = {"masters": 4 * parts if stage else 0, "Adam's moments": 8 * parts}
    host = 0
    if layout.offload_optimizer:
        host = sum(optimiser.values()) + _offload_buffers(layout)
        if stage < 3:
            state["buffer to and from the CPU"] = p * _largest(layout)
    else:
        state |= optimiser
        if stage == 3:
            state["gradients of this rank's part"] = layout.gradient_bytes * parts
    if _has_bf16_optimizer(layout):
        state["gradients in float32"] = layout.gradient_bytes * flat
    state["gradient bucket"] = bucket_bytes(layout)
    return {kind: size for kind, size in state.items() if size}, host


def _offload_buffers(layout: Layout) -> int:
    """Gradients in the CPU's memory, as Adam reads them and as they are added up. ZeRO 1 and 2 also
    have the updated parameters there before they go back, and one buffer; ZeRO 2 adds up whole
    touched parameters."""
    p, groups = layout.parameter_bytes, held_groups(layout)
    parts = sum(partition_elements(layout, group) for group in groups)
    if layout.zero_stage == 3:
        return 2 * layout.gradient_bytes * parts
    size = (layout.gradient_bytes + p) * parts + p * _largest(layout)
    if layout.zero_stage == 2 and layout.num_micro > 1:
        size += layout.gradient_bytes * sum(touched_elements(layout, group) for group in groups)
    return size


def _largest(layout: Layout) -> int:
    return max(size for group in held_groups(layout) for size in group.sizes)


def bucket_bytes(layout: Layout) -> int:
    """ZeRO 1 to 3 copy gradients to one buffer before they are reduced; ZeRO 2 in the parameters'
    dtype. Its size is a setting, and does not depend on the model."""
    if layout.zero_stage == 0 or _has_bf16_optimizer(layout):
        return 0
    size = layout.parameter_bytes if layout.zero_stage == 2 else layout.gradient_bytes
    return size * layout.bucket_elements


def live_elements(layout: Layout) -> int:
    """Elements of whole parameters that ZeRO 3 has gathered at a time: all that it must gather, up
    to its limit, and at least the largest."""
    gathered = _gathered_sizes(layout)
    return min(sum(gathered), max(layout.live_elements, *gathered)) if gathered else 0


def _gather_buffer(layout: Layout) -> int:
    """What arrives in one buffer is copied to each parameter: the parameters of the module that
    comes, or those fetched before it is their turn."""
    gathered = _gathered_sizes(layout)
    if not gathered:
        return 0
    ahead = min(layout.prefetch_elements, layout.live_elements)
    elements = min(sum(gathered), max(ahead, *gathered))
    return layout.parameter_bytes * elements


def _gathered_sizes(layout: Layout) -> list[int]:
    if layout.zero_stage < 3:
        return []
    groups = (group for group in held_groups(layout) if num_sharing(layout, group) > 1)
    return [size for group in groups for size in group.sizes]


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients that are no part of the state, by moment of a step."""

    held: int  # from earlier micro-batches, while a forward pass runs
    ended: int  # when the last backward pass ends
    reduced: int  # while a bucket is reduced
    step: int  # while the optimiser steps
    share_left: float = 0.0  # of the activations, when the first bucket is reduced


def gradient_bytes(layout: Layout) -> Gradients:
    """Return the bytes of gradients at each moment.

    - ZeRO 0: 4 (S + X) all along; a flat copy of up to one bucket while it is reduced.
    - ZeRO 1: the same, until after the last backward pass they move into the bucket. What has been
      reduced stays as the gradients of all *whole* parameters that this rank's part touches.
    - ZeRO 1 with bfloat16: DeepSpeed's BF16_Optimizer; bfloat16 gradients beside the float32 ones.
    - ZeRO 2: they move into the bucket as they are made; after every backward pass those of the
      touched parameters stay, until the next one's have been added. With bfloat16, this rank's
      part in float32 instead.
    - ZeRO 3: they move into the bucket; its parts are copied together for the reduce-scatter.
      gloo makes one more copy.
    - An offloaded optimiser: what has been reduced goes to the CPU's memory.
    """
    p, stage = layout.gradient_bytes, layout.zero_stage
    groups, has_held = held_groups(layout), layout.num_micro > 1
    whole = num_held(layout)
    # experts and the rest are reduced apart
    in_bucket = min(layout.bucket_elements, max(_class_elements(layout)))
    is_one_bucket = whole <= layout.bucket_elements
    largest_part = max(partition_elements(layout, group) for group in groups)
    if stage == 0:
        held = p * whole if has_held else 0
        return Gradients(held, p * whole, p * (whole + in_bucket), p * whole)
    if _has_bf16_optimizer(layout):
        own = layout.parameter_bytes * whole
        return Gradients(own if has_held else 0, own, own + p * in_bucket, own)
    copy = p * in_bucket if layout.world_size > 1 else 0
    left = max(0.0, 1.0 - layout.bucket_elements / whole)
    if stage == 3:
        copy = p * in_bucket * (1 if layout.is_cuda else 2)
        live = layout.parameter_bytes * min(live_elements(layout), int(left * whole))
        step = 0 if layout.offload_optimizer else p * largest_part
        return Gradients(0, 0, copy + live, step, left)
    if layout.offload_optimizer:
        held = p * whole if stage == 1 and has_held else 0
        ended = p * whole if stage == 1 else 0
        moved = p * min(whole, layout.bucket_elements)
        return Gradients(held, ended, max(0, ended - moved) + copy, 0, left if stage == 2 else 0.0)
    touched = p * sum(touched_elements(layout, group) for group in groups)
    step = touched + p * largest_part
    if stage == 1:
        moved = min(whole, layout.bucket_elements)
        reduced = max(copy, touched) if is_one_bucket else p * (whole - moved) + copy + touched
        return Gradients(p * whole if has_held else 0, p * whole, reduced, step)
    if layout.bf16_parameters:
        copy += layout.parameter_bytes * in_bucket  # before it is widened
        parts = p * sum(partition_elements(layout, group) for group in groups)
        return Gradients(parts if has_held else 0, parts, parts + copy, parts, left)
    held = touched if has_held else 0
    reduced = held + (max(copy, touched) if is_one_bucket else copy + touched)
    return Gradients(held, held, reduced, step, left)


def _class_elements(layout: Layout) -> tuple[int, int]:
    """Elements of the experts and of the rest."""
    groups = held_groups(layout)
    experts = sum(group.total for group in groups if group.is_expert)
    return experts, num_held(layout) - experts


def _has_bf16_optimizer(layout: Layout) -> bool:
    """What DeepSpeed takes for ZeRO 1 with bfloat16 parameters and float32 gradients."""
    return layout.zero_stage == 1 and layout.bf16_parameters and not layout.offload_optimizer
