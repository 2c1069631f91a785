"""Counts the floating-point operations that a model spends on a token, part by part.

A multiply-add is 2 operations. Products of matrices count, nothing else: the embedding is a
look-up, and norms, activations, rotary positions and softmax are below a percent.
"""

from __future__ import annotations

from phi_kernels import BlockPattern

from moe.model_config import ModelConfig


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Operations of one token in a forward pass over seq_len tokens, the mean over its places.

    - projections: 2 D (2 H C + 2 G C) a layer, for query, output, key and value (H query heads, G
      key heads of width C);
    - scores: 4 C for each pair of a query and a key that it sees (2 for query . key, 2 for the
      weighted sum of values), all heads, counted exactly (visible_pairs) and divided by seq_len;
    - router: 2 D E a layer;
    - experts: 2 * 3 D F for each of the top_k experts of a token; feed_forward: 2 * 3 D F;
    - head: 2 D V, tied or not.
    """
    width_q, width_kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    d, num_layers = model.hidden_size, model.num_layers
    block = 6.0 * d * model.intermediate_size
    table = {
        "projections": num_layers * 2.0 * d * (2 * width_q + 2 * width_kv),
        "scores": 4.0 * model.head_dim * all_visible_pairs(model, seq_len) / seq_len,
        "router": num_layers * 2.0 * d * model.num_experts,
        "experts": num_layers * model.top_k * block if model.is_sparse else 0.0,
        "feed_forward": 0.0 if model.is_sparse else num_layers * block,
        "head": 2.0 * d * model.vocab_size,
    }
    return {part: flops for part, flops in table.items() if flops}


def decode_flops(model: ModelConfig, num_cached: int) -> float:
    """Operations of the one token that follows num_cached tokens, with their keys cached."""
    last = all_visible_pairs(model, num_cached + 1) - all_visible_pairs(model, num_cached)
    table = forward_flops_per_token(model, 1)
    return sum(table.values()) - table["scores"] + 4.0 * model.head_dim * last


def all_visible_pairs(model: ModelConfig, seq_len: int) -> int:
    """(query, key) pairs of one text of seq_len tokens, over all heads of all layers."""
    num_sparse = sum(map(model.block_sparse.is_sparse_layer, range(model.num_layers)))
    total = (model.num_layers - num_sparse) * model.num_heads * _dense_pairs(model, seq_len)
    return total + (num_sparse * _sparse_pairs(model, seq_len) if num_sparse else 0)


def visible_pairs(model: ModelConfig, *, layer: int, seq_len: int) -> int:
    """(query, key) pairs of one text, over all heads of this layer: causal, within its window,
    or by the block-sparse pattern."""
    if model.block_sparse.is_sparse_layer(layer):
        return _sparse_pairs(model, seq_len)
    return model.num_heads * _dense_pairs(model, seq_len)


def block_pattern(model: ModelConfig) -> BlockPattern:
    """The model's block-sparse pattern, as its kernel takes it."""
    sparse = model.block_sparse
    return BlockPattern(
        block_size=sparse.block_size,
        num_local_blocks=sparse.num_local_blocks,
        vertical_stride=sparse.vertical_stride,
        is_same_for_all_heads=sparse.is_same_for_all_heads,
    )


def _dense_pairs(model: ModelConfig, seq_len: int) -> int:
    """Query i sees min(i, W) keys: W (W + 1) / 2 + (S - W) W for a window W, S (S + 1) / 2 else."""
    window = min(model.sliding_window or seq_len, seq_len)
    return window * (window + 1) // 2 + (seq_len - window) * window


def _sparse_pairs(model: ModelConfig, seq_len: int) -> int:
    """Block by block: queries of block i see the same whole blocks before it, and its own part."""
    pattern = block_pattern(model)
    size, total = pattern.block_size, 0
    for phase, heads in pattern.heads_by_phase(model.num_heads).items():
        for block, start in enumerate(range(0, seq_len, size)):
            num_queries = min(size, seq_len - start)
            num_before = num_blocks_before(pattern, block, phase=phase)
            pairs = num_queries * num_before * size + num_queries * (num_queries + 1) // 2
            total += len(heads) * pairs
    return total


def num_blocks_before(pattern: BlockPattern, block: int, *, phase: int) -> int:
    """How many blocks before its own a query in this block sees."""
    num_local = min(block, pattern.num_local_blocks - 1)
    num_far = block - num_local
    first_column = (-phase - 1) % pattern.vertical_stride
    columns = range(first_column, max(first_column, num_far), pattern.vertical_stride)
    return num_local + len(columns)
