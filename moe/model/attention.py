"""Grouped-query attention: rotary positions, document and window masks, key-value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.config import ModelConfig
from moe.model.layers import Linear
from moe.model.rope import rotate


@dataclass
class KeyValueCache:
    """Keys and values of one layer, written in place by attention; (B, kv heads, length, C).

    Keys are kept rotated. When a text crosses LongRoPE's original length every angle changes, and
    with them all hidden states above the first layer: moe/generate.py then runs the whole text
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


class Attention(nn.Module):
    """y_BSD = attention(x_BSD); which keys a query sees is decided by `attention_mask` below."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, c, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, c
        self.query = Linear(d, config.num_heads * c, bias=bias)
        self.key = Linear(d, config.num_kv_heads * c, bias=bias)
        self.value = Linear(d, config.num_kv_heads * c, bias=bias)
        self.output = Linear(config.num_heads * c, d, bias=bias)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None,
        cache: KeyValueCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """Rotary tables are those of x's places; with a cache, x continues `start` cached tokens.

        mask (B or 1, 1, S, keys) bool, True where a query sees a key; None is plain causal.
        """
        num_queries = x_BSD.shape[1]
        query, key, value = (
            self._split(x_BSD, *layer)
            for layer in (
                (self.query, self.num_heads),
                (self.key, self.num_kv_heads),
                (self.value, self.num_kv_heads),
            )
        )
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            end = start + num_queries
            cache.key[:, :, start:end], cache.value[:, :, start:end] = key, value
            key, value = (
                cache.key[:, :, :end].to(query.dtype),
                cache.value[:, :, :end].to(query.dtype),
            )
        out_BHSC = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and num_queries > 1,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.output(out_BHSC.transpose(1, 2).flatten(2))

    def _split(self, x_BSD: Tensor, layer: Linear, num_heads: int) -> Tensor:
        return layer(x_BSD).unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)


def attention_mask(
    *,
    num_queries: int,
    num_keys: int,
    document_BS: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Return bool (B or 1, 1, S, keys), or None where plain causal attention says the same.

    A query sees itself and earlier keys, at most `window` of them, of its own document. Window
    counts as transformers 5 does: 2047 visible keys, itself included, for sliding_window 2047.
    """
    is_windowed = window is not None and window < num_keys
    if document_BS is None and not is_windowed and num_queries in (1, num_keys):
        return None
    place_query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    place_key = torch.arange(num_keys, device=device)[None, :]
    mask = place_key <= place_query
    if window is not None:
        mask = mask & (place_key > place_query - window)
    mask = mask[None, None]
    if document_BS is not None:
        mask = mask & (document_BS[:, None, :, None] == document_BS[:, None, None, :])
    return mask
