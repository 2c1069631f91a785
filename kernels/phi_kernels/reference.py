"""Each operator as a few lines that a reader can check by eye; any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from phi_kernels.block_pattern import BlockPattern


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


def block_sparse_attention(
    query_BHSC: Tensor,
    key_BGKC: Tensor,
    value_BGKC: Tensor,
    *,
    pattern: BlockPattern,
    scale: float,
) -> Tensor:
    """Return out (B, H, S, C): softmax over the keys that the pattern shows, of scale * q . k.

    The queries are the last S of the K places; query head h reads key head h // (H / G).
    """
    num_heads, num_queries = query_BHSC.shape[1:3]
    num_keys = key_BGKC.shape[2]
    place_K = torch.arange(num_keys, device=query_BHSC.device)
    place_S = place_K[num_keys - num_queries :]
    mask_HSK = torch.zeros(
        num_heads, num_queries, num_keys, dtype=torch.bool, device=place_K.device
    )
    for phase, heads in pattern.heads_by_phase(num_heads).items():
        mask_HSK[heads] = pattern.sees(place_S[:, None], place_K[None, :], phase=phase)
    key_BHKC, value_BHKC = (
        part.repeat_interleave(num_heads // part.shape[1], dim=1) for part in (key_BGKC, value_BGKC)
    )
    score_BHSK = scale * (query_BHSC @ key_BHKC.transpose(2, 3))
    score_BHSK = score_BHSK.float() if score_BHSK.dtype != torch.float64 else score_BHSK
    probability_BHSK = score_BHSK.masked_fill(~mask_HSK, float("-inf")).softmax(dim=-1)
    return probability_BHSK.to(value_BHKC.dtype) @ value_BHKC


def causal_attention(
    query_BHSC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, *, scale: float
) -> Tensor:
    """Return out (B, H, S, C): softmax over the keys up to each query's place, of scale * q . k.

    Query head h reads key head h // (H / G).
    """
    length = query_BHSC.shape[2]
    everything = BlockPattern(
        block_size=max(1, length), num_local_blocks=1, vertical_stride=1, is_same_for_all_heads=True
    )
    return block_sparse_attention(query_BHSC, key_BGSC, value_BGSC, pattern=everything, scale=scale)
