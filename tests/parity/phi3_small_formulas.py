"""Phi-3-small written from its formulas alone: dense masks, in the published layout of tensors.

Nothing of moe is used. Sources: the released modeling_phi3_small.py, triton block-sparse kernels
and config.json. Parameters have the published names and layouts: query_key_value is grouped by
key-value head (its query heads, then its key, then its value), up_proj has gate and linear rows in
turns. Parameters in float64 give results that are exact next to float32 ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The published numbers are defaults; sizes are the test's."""

    vocab_size: int = 50
    hidden_size: int = 32
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 4
    intermediate_size: int = 24
    block_size: int = 64
    num_local_blocks: int = 16
    vert_stride: int = 8
    homo_head_pattern: bool = False
    dense_attention_every_n_layers: int = 2
    mup_attn_multiplier: float = 1.0
    mup_embedding_multiplier: float = 10.0
    mup_width_multiplier: float = 8.0
    gegelu_limit: float = 20.0
    rope_embedding_base: float = 1e6
    layer_norm_epsilon: float = 1e-5
    dummy_tokens: tuple[int, ...] = (3, 41, 49)
    # the 128k models: LongRoPE, one factor for each pair of a head
    original_max_position: int = 8192
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    short_mscale: float = 1.0
    long_mscale: float = 1.0


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Published name -> shape; the head is the embedding."""
    d, f, c = shape.hidden_size, shape.intermediate_size, shape.head_dim
    rows = (shape.num_heads + 2 * shape.num_kv_heads) * c
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, d)}
    for layer in range(shape.num_layers):
        for name, size in (
            ("input_layernorm", (d,)), ("post_attention_layernorm", (d,)),
            ("self_attn.query_key_value", (rows, d)),
            ("self_attn.dense", (d, shape.num_heads * c)),
            ("mlp.up_proj", (2 * f, d)), ("mlp.down_proj", (d, f)),
        ):  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = size
            shapes[f"model.layers.{layer}.{name}.bias"] = size[:1]
    shapes |= {"model.final_layernorm.weight": (d,), "model.final_layernorm.bias": (d,)}
    return shapes


def visible(shape: Shape, *, head: int, length: int, is_sparse: bool) -> Tensor:
    """Bool (length, length): what each query (row) of a head sees."""
    place = torch.arange(length)
    query, key = place[:, None], place[None, :]
    causal = query >= key
    if not is_sparse:
        return causal
    step = 0 if shape.homo_head_pattern else max(1, int(shape.vert_stride / shape.num_heads))
    query_block, key_block = query // shape.block_size, key // shape.block_size
    is_local = query_block - key_block < shape.num_local_blocks
    is_vertical = (key_block + head * step + 1) % shape.vert_stride == 0
    return causal & (query_block >= key_block) & (is_local | is_vertical)


def probabilities(query_SC: Tensor, key_SC: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """Softmax over the visible keys, with its largest score subtracted, written out."""
    score = (query_SC @ key_SC.T * scale).masked_fill(~mask, -math.inf)
    exponential = (score - score.amax(dim=1, keepdim=True).detach()).exp()
    return exponential / exponential.sum(dim=1, keepdim=True)


def logits(
    parameters: Mapping[str, Tensor],
    tokens_BS: Tensor,
    shape: Shape,
    *,
    dropped: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Logits (B, S, V) of whole texts.

    dropped: what dropout multiplies by, (B, S, D), 0 or 1 / (1 - share): of the embedding at -1,
    of the feed-forward block's output at its layer. Absent is evaluation.
    """
    rows = []
    for row, tokens_S in enumerate(tokens_BS):
        factors = {layer: factor[row] for layer, factor in (dropped or {}).items()}
        rows.append(_logits_of_row(parameters, tokens_S, shape, factors))
    return torch.stack(rows)


def _logits_of_row(
    parameters: Mapping[str, Tensor],
    tokens_S: Tensor,
    shape: Shape,
    factors: Mapping[int, Tensor],
) -> Tensor:
    embed = parameters["model.embed_tokens.weight"]
    x = embed[tokens_S] * factors.get(-1, 1.0) * shape.mup_embedding_multiplier
    for layer in range(shape.num_layers):
        at = _of_layer(parameters, layer)
        is_sparse = (layer + 1) % shape.dense_attention_every_n_layers != 0
        x = x + _attention(_layer_norm(x, at, "input_layernorm", shape), at, shape, is_sparse)
        out = _feed_forward(_layer_norm(x, at, "post_attention_layernorm", shape), at, shape)
        x = x + out * factors.get(layer, 1.0)
    x = _layer_norm(x, lambda name: parameters[f"model.{name}"], "final_layernorm", shape)
    out = x @ embed.T / shape.mup_width_multiplier
    masked = torch.zeros(shape.vocab_size, dtype=torch.bool)
    masked[list(shape.dummy_tokens)] = True
    return out.masked_fill(masked, torch.finfo(out.dtype).min)


def _of_layer(parameters: Mapping[str, Tensor], layer: int) -> Callable[[str], Tensor]:
    return lambda name: parameters[f"model.layers.{layer}.{name}"]


def _layer_norm(x: Tensor, at: Callable[[str], Tensor], name: str, shape: Shape) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    normal = centred / (variance + shape.layer_norm_epsilon).sqrt()
    return normal * at(f"{name}.weight") + at(f"{name}.bias")


def _linear(x: Tensor, at: Callable[[str], Tensor], name: str) -> Tensor:
    return x @ at(f"{name}.weight").T + at(f"{name}.bias")


def _attention(x: Tensor, at: Callable[[str], Tensor], shape: Shape, is_sparse: bool) -> Tensor:
    length, c = x.shape[0], shape.head_dim
    per_group = shape.num_heads // shape.num_kv_heads
    joined = _linear(x, at, "self_attn.query_key_value")
    joined = joined.view(length, shape.num_kv_heads, per_group + 2, c)
    outs = []
    for head in range(shape.num_heads):
        group, inside = divmod(head, per_group)
        query = _rotate(joined[:, group, inside], shape)
        key = _rotate(joined[:, group, per_group], shape)
        mask = visible(shape, head=head, length=length, is_sparse=is_sparse)
        probability = probabilities(query, key, mask, scale=shape.mup_attn_multiplier / c)
        outs.append(probability @ joined[:, group, per_group + 1])
    return _linear(torch.cat(outs, dim=1), at, "self_attn.dense")


def _rotate(x_SC: Tensor, shape: Shape) -> Tensor:
    half = shape.head_dim // 2
    place = torch.arange(x_SC.shape[0], dtype=torch.float64)
    is_long = x_SC.shape[0] > shape.original_max_position
    factors = (shape.long_factor if is_long else shape.short_factor) or (1.0,) * half
    mscale = shape.long_mscale if is_long else shape.short_mscale
    frequency = [
        1 / (factor * shape.rope_embedding_base ** (2 * i / shape.head_dim))
        for i, factor in enumerate(factors)
    ]
    angle = place[:, None] * torch.tensor(frequency, dtype=torch.float64)
    cos, sin = (mscale * table.to(x_SC.dtype) for table in (angle.cos(), angle.sin()))
    first, second = x_SC[:, :half], x_SC[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)


def _feed_forward(x: Tensor, at: Callable[[str], Tensor], shape: Shape) -> Tensor:
    z = _linear(x, at, "mlp.up_proj")
    gate, linear = z[:, 0::2], z[:, 1::2]
    gate = torch.minimum(gate, torch.tensor(shape.gegelu_limit, dtype=z.dtype))
    linear = linear.clamp(-shape.gegelu_limit, shape.gegelu_limit)
    quick_gelu = gate / (1 + (-1.702 * gate).exp())
    return _linear(quick_gelu * (linear + 1), at, "mlp.down_proj")
