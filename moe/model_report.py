"""What a model of a given shape needs: memory for its parameters, its cache and a pass through it.

Plain arithmetic on ModelConfig; the formulas are in the docstrings. Letters as in moe/__init__.py,
with G key heads, W a sliding window; `a` is the bytes of a number in matrix products (2 in
bfloat16), 4 the bytes of the residual stream in training.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.config import RouterConfig
from moe.model_config import ModelConfig
from moe.model_flops import block_pattern, num_blocks_before

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# float32 weight, gradient and AdamW's two moments
TRAINING_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the key-value cache of a batch of texts of one length."""

    allocated: int  # what generation holds: every place of every layer
    needed: int  # what the next token can still see


def cache_size(model: ModelConfig, *, batch_size: int, seq_len: int, dtype: str) -> CacheSize:
    """Return the cache's bytes: 2 B S L G C a allocated, for keys and values.

    Needed are, in a layer with a sliding window, the last W places; in a block-sparse layer, for
    each key head, the places that the last query sees through any of its query heads (local
    blocks, and the columns of each head's phase).
    """
    per_place = 2 * batch_size * model.head_dim * BYTES[dtype]
    num_sparse = sum(map(model.block_sparse.is_sparse_layer, range(model.num_layers)))
    dense = model.num_kv_heads * min(seq_len, model.sliding_window or seq_len)
    needed = (model.num_layers - num_sparse) * dense
    if num_sparse:
        needed += num_sparse * _sparse_places(model, seq_len)
    allocated = model.num_layers * model.num_kv_heads * seq_len
    return CacheSize(allocated=per_place * allocated, needed=per_place * needed)


def _sparse_places(model: ModelConfig, seq_len: int) -> int:
    """Places of all key heads that the query at the end of seq_len tokens sees."""
    pattern = block_pattern(model)
    size, block = pattern.block_size, (seq_len - 1) // pattern.block_size
    phase_of_head = {
        head: phase
        for phase, heads in pattern.heads_by_phase(model.num_heads).items()
        for head in heads
    }
    group, total = model.num_heads // model.num_kv_heads, 0
    num_local = min(block, pattern.num_local_blocks - 1)
    own = seq_len - block * size
    for first in range(0, model.num_heads, group):
        phases = {phase_of_head[head] for head in range(first, first + group)}
        # other phases are other columns, so they add up
        columns = sum(num_blocks_before(pattern, block, phase=p) - num_local for p in phases)
        total += own + (num_local + columns) * size
    return total


def training_activations(
    model: ModelConfig,
    router: RouterConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: str,
    recompute: bool = False,
) -> dict[str, int]:
    """Return the bytes kept from the forward for the backward pass of a step, part by part.

    Parameters are float32; dtype bfloat16 means autocast, where each layer's weights are also kept
    as copies in bfloat16. For T = B S tokens and each layer, bytes a token:

    - norms: 2 inputs of 4 D (RMSNorm: twice that, the product before its weight is kept too), and
      their statistics; the final norm once;
    - attention: its input (4 D once; in bfloat16 a copy for each of query, key and value), rotated
      queries, the output and its copy with heads side by side 3 a H C, keys and values 2 a G C,
      log-sums 4 H; in a block-sparse layer, where a text is longer than the local blocks, keys and
      values of every query head too, 2 a H C;
    - attention masks: a S in dense layers, for a mask keeps the documents of a window apart;
    - feed_forward: input a D, 4 a F (gate and up, the activation, its product with up); GEGELU
      7 a F + 2 F for its limits; the dropout mask a D;
    - experts: rows in and out, 2 K a D, and 4 K a F; router: its input 4 D, with jitter twice, and
      its probabilities and indices;
    - logits: a V, and the head's input a D.

    With recompute (activation checkpointing) a layer keeps its input, 4 D, and in the backward pass
    one layer at a time has all of the above, the copies of its weights too.
    """
    a, num_tokens, d = BYTES[dtype], batch_size * seq_len, model.hidden_size
    layer_parts = [
        _layer(model, router, layer=layer, batch_size=batch_size, seq_len=seq_len, a=a)
        for layer in range(model.num_layers)
    ]
    names = list(dict.fromkeys(name for parts in layer_parts for name in parts))
    if recompute:
        table = {"layer inputs": model.num_layers * num_tokens * 4 * d}
        largest = max(layer_parts, key=lambda parts: sum(parts.values()))
        table |= {f"{name}, one layer": largest[name] for name in names if name in largest}
    else:
        table = {name: sum(parts.get(name, 0) for parts in layer_parts) for name in names}
    table["final norm"] = num_tokens * _norm_bytes(model)
    table["head and logits"] = num_tokens * a * (d + model.vocab_size)
    if model.embedding_dropout:
        table["embedding dropout"] = num_tokens * 4 * d
    if dtype != "float32":
        num_layers = 1 if recompute else model.num_layers
        in_layers = _matrix_parameters(model) * num_layers // model.num_layers
        table[f"weights in {dtype}"] = a * (in_layers + model.vocab_size * d)
    return {name: size for name, size in table.items() if size}


def _layer(
    model: ModelConfig,
    router: RouterConfig,
    *,
    layer: int,
    batch_size: int,
    seq_len: int,
    a: int,
) -> dict[str, int]:
    num_tokens, d, f = batch_size * seq_len, model.hidden_size, model.intermediate_size
    width_q, width_kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    is_sparse_layer = model.block_sparse.is_sparse_layer(layer)
    copies = 3 * a if a < 4 else 4
    parts = {"norms": 2 * _norm_bytes(model)}
    parts["attention"] = copies * d + a * (3 * width_q + 2 * width_kv) + 4 * model.num_heads
    if not is_sparse_layer:
        parts["attention masks"] = a * seq_len
    elif seq_len > model.block_sparse.num_local_blocks * model.block_sparse.block_size:
        parts["attention"] += 2 * a * width_q
    if model.is_sparse:
        k, has_jitter = model.top_k, router.input_jitter > 0
        parts["experts"] = k * a * (2 * d + 4 * f)
        indices = 16 * k + 12 * k + 8 * 2  # of rows, slots and choices, and the weights
        parts["router"] = 4 * d * (2 if has_jitter else 1) + 10 * model.num_experts + indices
    else:
        per_f = 4 * a if model.feed_forward == "swiglu" else 7 * a + 2
        parts["feed_forward"] = a * d + per_f * f
        parts["feed_forward"] += a * d if model.feed_forward_dropout else 0
    return {name: num_tokens * size for name, size in parts.items()}


def _norm_bytes(model: ModelConfig) -> int:
    """Of one norm and one token: its input and statistics, RMSNorm's product."""
    return 4 * model.hidden_size * (2 if model.norm == "rmsnorm" else 1) + 8


def _matrix_parameters(model: ModelConfig) -> int:
    """Parameters of all layers that autocast copies: not the router's, which stays float32."""
    table = model.parameter_table()
    return sum(table.get(part, 0) for part in ("attention", "experts", "feed_forward"))


def inference_activations(
    model: ModelConfig, *, batch_size: int, seq_len: int, dtype: str, last_only: bool = True
) -> int:
    """Return about the most bytes alive at once in a forward pass without gradients.

    The largest of three moments, beside the residual stream before and inside a block, 2 a T D:

    - rotary positions, in float32: the norm's output, query, key and value, and four float32
      copies of the query;
    - the feed-forward block: its input, then 2 F, the activation and the product, for K rows a
      token with experts, whose rows in and out are held too;
    - the logits: the norm's output, and a V for the last place of each text (generation) or for
      every one (evaluation), twice where they are divided or masked.

    Masks, the key-value cache, and what an attention kernel needs inside are not in it.
    """
    a, num_tokens = BYTES[dtype], batch_size * seq_len
    d, f = model.hidden_size, model.intermediate_size
    width_q, width_kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    rotary = a * d + a * (width_q + 2 * width_kv) + 4 * 4 * width_q
    if model.is_sparse:
        feed_forward = a * d + model.top_k * a * (2 * d + 4 * f)
    else:
        feed_forward = a * d + (4 if model.feed_forward == "swiglu" else 7) * a * f
    copies = 2 if model.logit_divisor != 1.0 or model.masked_tokens else 1
    num_logits = batch_size if last_only else num_tokens
    logits = num_logits * a * model.vocab_size * copies
    layers = num_tokens * max(rotary, feed_forward)
    return 2 * num_tokens * a * d + max(layers, num_tokens * a * d + logits)
