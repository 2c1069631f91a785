"""Causal attention of whole texts: torch's, and a faster one for bfloat16 inference on a CPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

_SCORES = 2**19  # float32 scores held at a time: 2 MiB, so that softmax finds them in the cache
_LEAST_TOKENS = 192  # shorter texts are as fast in torch's own
_MOST_QUERIES = 128  # of a chunk; half of the last block's scores are masked and so wasted


def causal_attention(
    query_BHSC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, *, scale: float
) -> Tensor:
    """Return out (B, H, S, C): softmax over the keys up to each query's place, of scale * q . k.

    Query head h reads key head h // (H / G). The same as reference.causal_attention.
    """
    if query_BHSC.shape[2] >= _LEAST_TOKENS and is_bfloat16_inference_on_a_cpu(query_BHSC):
        return _in_bfloat16(query_BHSC, key_BGSC, value_BGSC, scale)
    return functional.scaled_dot_product_attention(
        query_BHSC, key_BGSC, value_BGSC, is_causal=True, scale=scale,
        enable_gqa=query_BHSC.shape[1] != key_BGSC.shape[1],
    )  # fmt: skip


def _in_bfloat16(query_BHSC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, scale: float) -> Tensor:
    """Scores with bfloat16 products and float32 sums, as exact as torch's float32 products.

    torch's CPU kernel multiplies bfloat16 numbers in float32, at a quarter of the rate. 4 heads of
    64, 1,024 tokens, two cores with AVX512-BF16: 4.8 ms there, 3.0 ms here; error of the output
    against float64 0.0018 there, 0.0023 here (bfloat16 itself: 0.0020).
    """
    batch, num_heads, length, width = query_BHSC.shape
    num_kv_heads = key_BGSC.shape[1]
    repeat = num_heads // num_kv_heads
    query = query_BHSC.reshape(batch * num_kv_heads, repeat, length, width)
    key = key_BGSC.reshape(batch * num_kv_heads, length, width)
    value = value_BGSC.reshape(batch * num_kv_heads, length, width)
    rows = min(_MOST_QUERIES, max(16, _SCORES // (length * repeat)))
    group = max(1, _SCORES // (length * repeat * rows))  # key heads at a time
    is_later = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    out = torch.empty_like(query)
    for first in range(0, len(query), group):
        heads = slice(first, first + group)
        for start in range(0, length, rows):
            end = min(length, start + rows)
            out[heads, :, start:end] = attend_in_bfloat16(
                query[heads, :, start:end],
                key[heads, :end],
                value[heads, :end],
                hidden=is_later[: end - start, : end - start],
                scale=scale,
            )
    return out.view(batch, num_heads, length, width)


def attend_in_bfloat16(
    query_NRQC: Tensor, key_NKC: Tensor, value_NKC: Tensor, *, hidden: Tensor, scale: float
) -> Tensor:
    """Return out (N, R, Q, C), bfloat16, on a CPU: R query heads share each of N key heads.

    hidden (Q, at most K) bool: True where a query does not see a key; it is about the last keys,
    and all before them are seen.
    """
    num_repeats, num_queries = query_NRQC.shape[1:3]
    # a power of two leaves bfloat16 numbers exact; what is left of the scale multiplies the scores
    power = 2.0 ** round(math.log2(scale))
    query = (query_NRQC * power).float().flatten(1, 2)
    with _bfloat16_products():
        score = torch.bmm(query, key_NKC.float().transpose(1, 2))
    if scale != power:
        score.mul_(scale / power)
    score = score.unflatten(1, (num_repeats, num_queries))
    score[..., score.shape[-1] - hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    weight = score.softmax(dim=-1).to(torch.bfloat16).flatten(1, 2)
    return torch.bmm(weight, value_NKC).unflatten(1, (num_repeats, num_queries))


def is_bfloat16_inference_on_a_cpu(query: Tensor) -> bool:
    """Whether attend_in_bfloat16 takes this query."""
    is_inference = not (torch.is_grad_enabled() and query.requires_grad)
    return is_inference and query.device.type == "cpu" and query.dtype == torch.bfloat16


@contextlib.contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let oneDNN multiply float32 as bfloat16 with float32 sums: exact for numbers that are."""
    setting = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
