"""Rotary positions and LongRoPE (arXiv 2402.13753): cos and sin tables, and their application."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.config import RopeConfig


def rotary_tables(
    position_BS: Tensor, config: RopeConfig, *, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Return float32 cos and sin, each (B, S, C), scaled by the regime's mscale.

    angle = position / (factor_i * theta^(2i/C)). The long factors hold for every token of a batch
    that reaches beyond the original length (strictly: 4096 positions are still short), as in the
    released model; the switch is a tensor operation, without host synchronisation.
    """
    device = position_BS.device
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequency = config.theta**-exponent
    is_long = position_BS.max() + 1 > config.original_max_position
    if config.short_factor is not None and config.long_factor is not None:
        short, long = (
            torch.tensor(f, device=device) for f in (config.short_factor, config.long_factor)
        )
        frequency = frequency / torch.where(is_long, long, short)
    angle = position_BS[..., None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    mscale = torch.where(is_long, config.long_mscale, config.short_mscale)
    return angle.cos() * mscale, angle.sin() * mscale


def rotate(x_BHSC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """Rotate halves: x cos + (-x2, x1) sin, in float32, returned in x's dtype."""
    first, second = x_BHSC.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BHSC * cos_BSC[:, None] + turned * sin_BSC[:, None]).to(x_BHSC.dtype)
