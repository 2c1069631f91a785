"""Grouped-query attention: rotary positions, which keys a query sees, key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from phi_kernels import BlockPattern, block_sparse_attention, causal_attention
from torch import Tensor, nn
from torch.nn import functional

from moe.model.layers import Linear
from moe.model.rope import rotate
from moe.model_config import ModelConfig


@dataclass
class KeyValueCache:
    """Keys and values of one layer, written in place by attention; (B, kv heads, length, C).

    Keys are kept rotated. When a text crosses LongRoPE's original length every angle changes, and
    with them all hidden states above the first layer: moe/text_batch.py then runs the whole text
    again, the only way to the logits of one pass.
    """

    key: Tensor
    value: Tensor

    @staticmethod
    def empty(
        config: ModelConfig, *, batch: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> list[KeyValueCache]:
        """Return one cache a layer for texts of at most `length` tokens."""
        shape = (batch, config.num_kv_heads, length, config.head_dim)
        make = lambda: torch.zeros(shape, device=device, dtype=dtype)  # noqa: E731
        return [KeyValueCache(make(), make()) for _ in range(config.num_layers)]


@dataclass(frozen=True)
class Segment:
    """Consecutive queries and keys of one text in one row, or in all rows where row is None."""

    row: int | None
    queries: slice
    keys: slice


@dataclass(frozen=True)
class Visibility:
    """Which keys the queries of a forward pass see: the same rule for both kinds of layer."""

    mask: Tensor | None  # dense layers: bool (B or 1, 1, S, keys); None is plain causal
    segments: tuple[Segment, ...]  # block-sparse layers; empty where the model has none


class Attention(nn.Module):
    """y_BSD = attention(x_BSD), dense or by phi-3-small's pattern, as the layer's number says."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        d, c, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, c
        self.query = Linear(d, config.num_heads * c, bias=bias)
        self.key = Linear(d, config.num_kv_heads * c, bias=bias)
        self.value = Linear(d, config.num_kv_heads * c, bias=bias)
        self.output = Linear(config.num_heads * c, d, bias=bias)
        is_sparse = config.block_sparse.is_sparse_layer(layer)
        self.attend = attend_by_blocks(config) if is_sparse else attend_densely(config)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        visibility: Visibility,
        cache: KeyValueCache | None = None,
        start: int = 0,
        num_queries: int | None = None,
    ) -> Tensor:
        """Return y of the last num_queries places of x (all if absent), whose visibility is given.

        Rotary tables are of x's places; with a cache, x continues `start` cached tokens.
        """
        num_queries = x_BSD.shape[1] if num_queries is None else num_queries
        query = self._split(x_BSD[:, -num_queries:], self.query, self.num_heads)
        key = self._split(x_BSD, self.key, self.num_kv_heads)
        value = self._split(x_BSD, self.value, self.num_kv_heads)
        query = rotate(query, *(table[:, -num_queries:] for table in rotary))
        key = rotate(key, *rotary)
        if cache is not None:
            end = start + x_BSD.shape[1]
            cache.key[:, :, start:end], cache.value[:, :, start:end] = key, value
            key, value = (
                cache.key[:, :, :end].to(query.dtype),
                cache.value[:, :, :end].to(query.dtype),
            )
        out_BHSC = self.attend(query, key, value, visibility)
        return self.output(out_BHSC.transpose(1, 2).flatten(2))

    def _split(self, x_BSD: Tensor, layer: Linear, num_heads: int) -> Tensor:
        return layer(x_BSD).unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)


Attend = Callable[[Tensor, Tensor, Tensor, Visibility], Tensor]


def attend_densely(config: ModelConfig) -> Attend:
    """Return the function (query_BHSC, key_BGKC, value_BGKC, visibility) -> out_BHSC."""
    is_grouped, scale = config.num_heads != config.num_kv_heads, config.softmax_scale

    def attend(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
        if visibility.mask is None and query.shape[2] > 1:
            return causal_attention(query, key, value, scale=scale)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visibility.mask, scale=scale, enable_gqa=is_grouped
        )

    return attend


def attend_by_blocks(config: ModelConfig) -> Attend:
    """The same by the block-sparse pattern, whose blocks are counted from the start of a text."""
    sparse = config.block_sparse
    pattern = BlockPattern(
        block_size=sparse.block_size,
        num_local_blocks=sparse.num_local_blocks,
        vertical_stride=sparse.vertical_stride,
        is_same_for_all_heads=sparse.is_same_for_all_heads,
    )
    scale = config.softmax_scale

    def attend(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
        parts = [
            block_sparse_attention(
                query[rows, :, part.queries],
                key[rows, :, part.keys],
                value[rows, :, part.keys],
                pattern=pattern,
                scale=scale,
            )
            for part in visibility.segments
            for rows in [slice(None) if part.row is None else slice(part.row, part.row + 1)]
        ]
        if len(parts) == 1 and parts[0].shape == query.shape:
            return parts[0]
        by_row: dict[int, list[Tensor]] = {}
        for part, out in zip(visibility.segments, parts, strict=True):
            by_row.setdefault(part.row or 0, []).append(out)
        return torch.cat([torch.cat(outs, dim=2) for _, outs in sorted(by_row.items())])

    return attend


def visibility(
    config: ModelConfig,
    *,
    num_queries: int,
    num_keys: int,
    document_BS: Tensor | None,
    padding_B: Tensor | None,
    device: torch.device,
) -> Visibility:
    """Return what the last num_queries of num_keys places see.

    A query sees itself and earlier keys, at most sliding_window of them, of its own document
    (document_BS, queries = keys), none of the padding_B places before its text. Padding sees
    itself, or its softmax would be 0 / 0.
    """
    sparse = config.block_sparse
    layers = [sparse.is_sparse_layer(layer) for layer in range(config.num_layers)]
    mask = None
    if not all(layers):
        mask = attention_mask(
            num_queries=num_queries, num_keys=num_keys, document_BS=document_BS,
            padding_B=padding_B, window=config.sliding_window, device=device,
        )  # fmt: skip
    segments: tuple[Segment, ...] = ()
    if any(layers):
        segments = attention_segments(
            num_queries=num_queries, num_keys=num_keys, document_BS=document_BS,
            padding_B=padding_B,
        )  # fmt: skip
    return Visibility(mask, segments)


def attention_mask(
    *,
    num_queries: int,
    num_keys: int,
    document_BS: Tensor | None,
    padding_B: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Return bool (B or 1, 1, S, keys), or None where plain causal attention says the same."""
    is_windowed = window is not None and window < num_keys
    is_plain = document_BS is None and padding_B is None and not is_windowed
    if is_plain and num_queries in (1, num_keys):
        return None
    place_query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    place_key = torch.arange(num_keys, device=device)[None, :]
    mask = place_key <= place_query
    if window is not None:
        mask = mask & (place_key > place_query - window)
    mask = mask[None, None]
    if document_BS is not None:
        mask = mask & (document_BS[:, None, :, None] == document_BS[:, None, None, :])
    if padding_B is not None:
        is_text = place_key >= padding_B[:, None, None, None]
        mask = (mask & is_text) | (place_key == place_query)
    return mask


def attention_segments(
    *, num_queries: int, num_keys: int, document_BS: Tensor | None, padding_B: Tensor | None
) -> tuple[Segment, ...]:
    """Cut the rows into texts, each with the places of its queries and of its keys."""
    start = num_keys - num_queries
    if document_BS is not None:
        rows = [
            _runs(document) for document in document_BS.tolist()
        ]  # syncs: a text's length decides the work
    elif padding_B is not None:
        rows = [
            [(0, pad), (pad, num_keys)] if pad else [(0, num_keys)]
            for pad in padding_B.tolist()  # syncs: the same
        ]
    else:
        return (Segment(None, slice(0, num_queries), slice(0, num_keys)),)
    return tuple(
        Segment(row, slice(max(0, first - start), end - start), slice(first, end))
        for row, bounds in enumerate(rows)
        for first, end in bounds
        if end > start  # else all its queries were in an earlier pass
    )


def _runs(document: list[int]) -> list[tuple[int, int]]:
    """Bounds of the runs of equal numbers."""
    cuts = [0, *(i for i in range(1, len(document)) if document[i] != document[i - 1])]
    return list(zip(cuts, [*cuts[1:], len(document)], strict=True))
