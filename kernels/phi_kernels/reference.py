"""The expert arithmetic as a loop that a reader can check by eye; any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def expert_mlp(rows_ND: Tensor, offset_E: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor) -> Tensor:
    """Return rows (N, D): for expert e's rows, W2 (silu(W1 x) * W3 x).

    offset_E (E,) int32 holds the end of each expert's rows; gate_up_EHD (E, 2F, D) is W1 above W3;
    down_EDF (E, D, F) is W2. Reads the offsets on the host.
    """
    outputs, start = [], 0
    for end, gate_up_HD, down_DF in zip(offset_E.tolist(), gate_up_EHD, down_EDF, strict=True):
        gate, up = functional.linear(rows_ND[start:end], gate_up_HD).chunk(2, dim=-1)
        outputs.append(functional.linear(functional.silu(gate) * up, down_DF))
        start = end
    return torch.cat(outputs)
