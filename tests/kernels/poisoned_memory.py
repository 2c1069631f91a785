"""Fill every tensor that torch hands out unwritten, so that whoever reads it is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like, Tensor.new_empty: NaN, or -7777 in integers."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (Tensor, "new_empty"),
        (torch, "empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        if made.dtype == torch.bool or made.device.type == "meta":
            return made
        return made.fill_(float("nan") if made.dtype.is_floating_point else -7777)

    return wrapped
