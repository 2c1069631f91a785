"""Leave autocast where it is on, or do what it would; entering a context costs an operation."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which operations keep the types of their inputs."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def in_product_type(tensor: Tensor) -> Tensor:
    """The tensor as a matrix product would take it: in autocast's type where that is on.

    float64 stays, as autocast leaves it.
    """
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor
