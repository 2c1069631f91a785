"""Block-sparse causal attention that computes only what the pattern shows, on any device.

Heads of the same phase share their columns, and neighbouring queries nearly all of their keys: one
dense product with the keys gathered for a chunk of queries does the work of all its blocks. The
first and the last query of a chunk see a little less than was gathered; a small mask says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from phi_kernels.block_pattern import BlockPattern
from phi_kernels.causal_attention import (
    attend_in_bfloat16,
    causal_attention,
    is_bfloat16_inference_on_a_cpu,
)

# Queries of one product. Fewer: more gathers of the same keys; more: more keys that only some of
# the queries see. 8,192 tokens, 32 heads of 128, two cores, float32: 1.60 s (128), 1.55 s (256),
# 1.65 s (512), 1.97 s (1,024); dense causal attention takes 3.1 s
_CHUNK = 256


def block_sparse_attention(
    query_BHSC: Tensor,
    key_BGKC: Tensor,
    value_BGKC: Tensor,
    *,
    pattern: BlockPattern,
    scale: float,
) -> Tensor:
    """The same as reference.block_sparse_attention; memory grows with the keys of one chunk.

    With gradients, a chunk's keys are gathered again in the backward pass instead of being kept.
    """
    # the first queries see every key before them, whatever their head
    num_plain = min(pattern.num_local_blocks * pattern.block_size, key_BGKC.shape[2])
    if query_BHSC.shape[2] < key_BGKC.shape[2] or num_plain == 0:
        return _by_phase(query_BHSC, key_BGKC, value_BGKC, pattern=pattern, scale=scale)
    first = causal_attention(
        *(part[:, :, :num_plain] for part in (query_BHSC, key_BGKC, value_BGKC)), scale=scale
    )
    if num_plain == query_BHSC.shape[2]:
        return first
    rest = query_BHSC[:, :, num_plain:]
    others = _by_phase(rest, key_BGKC, value_BGKC, pattern=pattern, scale=scale)
    return torch.cat([first, others], dim=2)


def _by_phase(
    query_BHSC: Tensor,
    key_BGKC: Tensor,
    value_BGKC: Tensor,
    *,
    pattern: BlockPattern,
    scale: float,
) -> Tensor:
    num_heads, num_kv_heads = query_BHSC.shape[1], key_BGKC.shape[1]
    attend = _attend_and_forget if torch.is_grad_enabled() else _attend
    order, outs = [], []
    for phase, heads in pattern.heads_by_phase(num_heads).items():
        head = torch.tensor(heads, device=query_BHSC.device)
        kv_head = head // (num_heads // num_kv_heads)
        query, key, value = query_BHSC[:, head], key_BGKC[:, kv_head], value_BGKC[:, kv_head]
        chunks = [
            attend(query, key, value, bounds, pattern, phase, scale)
            for bounds in _chunks(query.shape[2], key.shape[2], pattern.block_size)
        ]
        outs.append(torch.cat(chunks, dim=2))
        order += heads
    place = torch.tensor(order, device=query_BHSC.device).argsort()
    return torch.cat(outs, dim=1)[:, place]


def _chunks(num_queries: int, num_keys: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Bounds of the queries of one product, in places of the keys, cut at whole blocks."""
    size = max(1, _CHUNK // block_size) * block_size
    start = num_keys - num_queries
    while start < num_keys:
        end = min(num_keys, start // size * size + size)
        yield start, end
        start = end


def _attend(
    query_BHSC: Tensor,
    key_BHKC: Tensor,
    value_BHKC: Tensor,
    bounds: tuple[int, int],
    pattern: BlockPattern,
    phase: int,
    scale: float,
) -> Tensor:
    start, end = bounds
    first_query = key_BHKC.shape[2] - query_BHSC.shape[2]
    place = _gathered_places(bounds, pattern, phase, query_BHSC.device)
    mask = None
    if end - start > 1:  # a single query sees all that was gathered for it
        query_place = torch.arange(start, end, device=place.device)
        mask = pattern.sees(query_place[:, None], place[None, :], phase=phase)
    query = query_BHSC[:, :, start - first_query : end - first_query]
    key, value = key_BHKC.index_select(2, place), value_BHKC.index_select(2, place)
    if mask is not None and is_bfloat16_inference_on_a_cpu(query):
        heads = zip(*(part.flatten(0, 1).split(1) for part in (query, key, value)), strict=True)
        outs = [
            attend_in_bfloat16(one[:, None], k, v, hidden=~mask, scale=scale) for one, k, v in heads
        ]
        return torch.cat(outs).view_as(query)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _attend_and_forget(*arguments) -> Tensor:
    return checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)


def _gathered_places(
    bounds: tuple[int, int], pattern: BlockPattern, phase: int, device: torch.device
) -> Tensor:
    """The keys that any query of the chunk sees: columns, then all that is local or later."""
    start, end = bounds
    size, stride = pattern.block_size, pattern.vertical_stride
    num_before = max(0, start // size - pattern.num_local_blocks + 1)  # blocks local to none
    first_column = (-phase - 1) % stride
    column = torch.arange(first_column, max(first_column, num_before), stride, device=device) * size
    inside = torch.arange(size, device=device)
    local = torch.arange(num_before * size, end, device=device)
    return torch.cat([(column[:, None] + inside).flatten(), local])
