"""Which ranges of parameters and moments DeepSpeed's ZeRO optimisers hold on this rank.

ZeRO 1 and 2 flatten each parameter group and give every rank one stretch of it; ZeRO 3 gives every
rank a part of each parameter. Both keep float32 values and Adam's moments in flat partitions. This
file reads their bookkeeping (deepspeed 0.19.8) and nothing else: `_hp_mapping` (ZeRO 1, 2, and the
bfloat16 optimiser that DeepSpeed takes for ZeRO 1 with bfloat16 parameters), `grad_position` and
`ds_tensor` (ZeRO 3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe.model.init import KeptPart
from moe.parallel.engine import whole_shape
from moe.parallel.expert_parallel import ExpertGroups
from moe.parallel.pieces import ADAM_MOMENTS, HeldRange


def held_ranges(model: nn.Module, optimizer: Any, groups: ExpertGroups | None) -> list[HeldRange]:
    """This rank's ranges; no other rank has an element of them."""
    ranges = []
    for name, parameter in model.named_parameters():
        found = _find(parameter, optimizer)
        if found is None:
            continue
        flat, first, own_start, count = found
        shape, start = whole_shape(_shape(parameter), parameter, groups)
        state = optimizer.optimizer.state.get(flat, {})
        moments = {key: state[key].narrow(0, first, count) for key in ADAM_MOMENTS if key in state}
        values = flat.detach().narrow(0, first, count)
        ranges.append(HeldRange(name, shape, start + own_start, values, moments, state.get("step")))
    return ranges


def _find(parameter: Tensor, optimizer: Any) -> tuple[Tensor, int, int, int] | None:
    """(flat partition, first element in it, first element in the parameter, how many)."""
    if _is_partitioned(parameter):
        group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = parameter.ds_zero_partition_rank * count  # type: ignore[attr-defined]
        count = min(count, parameter.ds_numel - start)  # type: ignore[attr-defined] the end is padding
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return (flat, offset, start, count) if count > 0 else None
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    held, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    flat = _flat_partitions(optimizer)[mapping.param_group_index]
    return flat, held.start, of_parameter.start, held.numel


def kept_parts(module: nn.Module) -> dict[str, KeptPart]:
    """This rank's part of each of a module's parameters that ZeRO 3 has partitioned, by name."""
    parts = {}
    for name, parameter in module.named_parameters():
        tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        start = parameter.ds_zero_partition_rank * tensor.ds_numel  # type: ignore[attr-defined]
        count = max(0, min(tensor.ds_numel, parameter.ds_numel - start))  # type: ignore[attr-defined] the end is padding
        parts[name] = KeptPart(tensor.view(-1)[:count], start)
    return parts


def _is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor")


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if _is_partitioned(parameter) else parameter.shape)  # type: ignore[attr-defined]


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    for name in (
        "fp32_partitioned_groups_flat",  # ZeRO 3
        "single_partition_of_fp32_groups",  # ZeRO 1 and 2
        "fp32_groups_flat_partition",  # ZeRO 1 with bfloat16 parameters
    ):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise TypeError(f"{type(optimizer).__name__}: no flat partitions; deepspeed has changed")


def start_partitioned_moments(optimizer: Any) -> None:
    """Give every partition zero moments, as the first update would, for a checkpoint to fill."""
    inner = optimizer.optimizer
    is_fused = any(group.get("fused") for group in inner.param_groups)
    for flat in _flat_partitions(optimizer):
        state = inner.state[flat]
        for key in ADAM_MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
        if "step" not in state:
            state["step"] = torch.zeros((), device=flat.device if is_fused else "cpu")


@torch.no_grad()
def round_parameters(model: nn.Module, optimizer: Any) -> None:
    """Give the parameters that the model computes with the values that were just read.

    All ranks call this together. ZeRO 1 and 2: rounded by the rank that holds them and gathered, as
    after an update; no rank reads them for itself, which would be the model as often as there are
    ranks. ZeRO 3: this rank's part.
    """
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
        return
    for parameter in model.parameters():
        found = _find(parameter, optimizer)
        if found is not None:
            flat, first, _, count = found
            part = parameter.ds_tensor.view(-1)[:count]  # type: ignore[attr-defined]
            part.copy_(flat.narrow(0, first, count))


def spoil_gradients(optimizer: Any) -> None:
    """Make this step's gradients not finite, so that the optimiser skips it and cleans up."""
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
        parts = optimizer.fp32_groups_gradient_flat_partition
    else:
        offloaded = getattr(optimizer, "norm_for_param_grads", {})
        for key in offloaded:  # with offload the norm was taken when a gradient was copied
            offloaded[key] = torch.tensor(math.nan)
        lists = (part for part in optimizer.averaged_gradients.values() if part is not None)
        parts = [tensor for tensors in lists for tensor in tensors if tensor is not None]
    for part in parts:
        part.fill_(math.nan)


def forget_gradients(optimizer: Any) -> None:
    """Drop what a skipped step left in the partitions of ZeRO 1 and 2.

    With bfloat16 parameters and the optimiser on the CPU DeepSpeed keeps that buffer, and every
    later step is not finite either.
    """
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
