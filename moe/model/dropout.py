"""Dropout whose mask is a hash of the token, so that it is the same on any number of processes."""

from __future__ import annotations

from torch import Tensor

from moe.sparse.noise import symmetric


def dropout(
    x_BSD: Tensor, key_BS: Tensor | None, *, share: float, layer: int, purpose: int
) -> Tensor:
    """Set a share of x's numbers to 0 and divide the others by 1 - share; none without keys."""
    if key_BS is None or share == 0.0:
        return x_BSD
    noise = symmetric(key_BS.flatten(), layer=layer, purpose=purpose, width=x_BSD.shape[-1])
    is_kept = (noise.view_as(x_BSD) + 1.0) / 2.0 >= share
    return x_BSD * is_kept.to(x_BSD.dtype) / (1.0 - share)
