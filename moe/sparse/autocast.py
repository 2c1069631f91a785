"""Leave autocast where it is on; entering a context costs as much as a small operation."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which operations keep the types of their inputs."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
