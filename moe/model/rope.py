"""Rotary positions and LongRoPE (arXiv 2402.13753): cos and sin tables, and their application."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moe.model_config import RopeConfig


def rotary_tables(
    position_BS: Tensor,
    config: RopeConfig,
    *,
    rotary_dim: int,
    document_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return float32 cos and sin, each (B, S, rotary_dim), scaled by the regime's mscale.

    angle = position / (factor_i * theta^(2i / rotary_dim)). The long factors hold for every token
    of a text that reaches beyond the original length (strictly: 4096 positions are still short).
    A text is a document of a row, or a row where document_BS is None. transformers switches all
    rows of a batch together; here what a text gets does not depend on what it was packed or
    batched with. The switch is a tensor operation, without host synchronisation.
    """
    device = position_BS.device
    exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    # 1 / theta^x, not theta^-x: the last bit is the originals'
    frequency = 1.0 / config.theta**exponent
    is_long_BS1 = (_last_position(position_BS, document_BS) + 1 > config.original_max_position)[
        ..., None
    ]
    if config.short_factor is not None and config.long_factor is not None:
        short, long = (
            torch.tensor(factor, device=device) * config.theta**exponent
            for factor in (config.short_factor, config.long_factor)
        )
        frequency = 1.0 / torch.where(is_long_BS1, long, short)
    angle = position_BS[..., None].float() * frequency
    mscale = torch.where(is_long_BS1, config.long_mscale, config.short_mscale)
    cos, sin = angle.cos() * mscale, angle.sin() * mscale
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def _last_position(position_BS: Tensor, document_BS: Tensor | None) -> Tensor:
    """The highest position of each place's text: (B, S), or (B, 1) where a row is one text."""
    if document_BS is None:
        return position_BS.amax(dim=1, keepdim=True)
    position_BS = position_BS.expand_as(document_BS)
    # numbers of documents may be any; a document's tokens are neighbours, so it is a run
    is_next = document_BS[:, 1:] != document_BS[:, :-1]
    run_BS = functional.pad(is_next.cumsum(dim=1), (1, 0))
    last_BR = torch.zeros_like(position_BS).scatter_reduce(1, run_BS, position_BS, "amax")
    return last_BR.gather(1, run_BS)


def rotate(x_BHSC: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """Rotate halves of a head's first R numbers: x cos + (-x2, x1) sin, in float32, back in
    x's dtype."""
    cos, sin = cos_BSR[:, None], sin_BSR[:, None]
    rotated, passed = x_BHSC.split([cos.shape[-1], x_BHSC.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.float().chunk(2, dim=-1)
    (cos_first, cos_second), (sin_first, sin_second) = (t.chunk(2, dim=-1) for t in (cos, sin))
    # products and sums in one pass: large temporaries cost more than the arithmetic
    halves = (
        torch.addcmul(first * cos_first, second, sin_first, value=-1),
        torch.addcmul(second * cos_second, first, sin_second),
    )
    rotated = torch.cat(halves, dim=-1).to(x_BHSC.dtype)
    return rotated if passed.shape[-1] == 0 else torch.cat([rotated, passed], dim=-1)
