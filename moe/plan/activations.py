"""What one forward pass of a rank keeps for its backward pass, by part of the model."""

from __future__ import annotations

import dataclasses

from moe.model_report import training_activations
from moe.plan.held import held_groups
from moe.plan.layout import Layout

# back-ends that keep rows in, pre-activation, activation, its product and rows out: 2 D + 4 F a
# row. The others (cpu, triton, and auto, which takes one of them) keep the pre-activation: 2 F
_KEEP_ALL = ("grouped_mm", "megablocks", "reference")
# moe/train/cross_entropy.py widens so many numbers at a time
_CHUNK_BYTES = 4 * 2**23


def kept_activations(layout: Layout) -> dict[str, int]:
    """Bytes kept of one micro-batch, part by part, as in moe/model_report.py, with what differs:

    - experts: by back-end (above); with experts.recompute their input alone, a D a token, and
      nothing where that is the router's input too (float32);
    - expert parallelism: the rows that arrived, and those that came back for their weights, K a D
      each; uniform routing, so as many rows arrive as leave;
    - copies of weights in the products' dtype: those of the experts held here; none where the
      parameters are in it already;
    - parameters in bfloat16: the residual stream is too, so everything but the router's float32
      input is half of what float32 keeps.
    """
    model, router = layout.model, layout.router
    dtype = "float32" if layout.bf16_parameters else layout.dtype
    table = training_activations(
        model,
        router,
        batch_size=layout.micro_batch_size,
        seq_len=layout.seq_len,
        dtype=dtype,
        recompute=layout.activation_checkpointing,
    )
    num_layers = 1 if layout.activation_checkpointing else model.num_layers
    if layout.bf16_parameters:
        is_router = lambda part: part.startswith("router")  # noqa: E731
        table = {part: size if is_router(part) else size // 2 for part, size in table.items()}
    copies = [part for part in table if part.startswith("weights in ")]
    for part in copies:
        table[part] = _weight_copies(layout, num_layers)
    if model.is_sparse:
        part = "experts, one layer" if layout.activation_checkpointing else "experts"
        table[part] = num_layers * _experts_of_layer(layout)
        if layout.expert_parallel_size > 1:
            name = part.replace("experts", "exchanged rows")
            rows = layout.tokens_of_pass * model.top_k
            received = 0 if _keeps_received(layout) else rows
            table[name] = num_layers * layout.product_bytes * model.hidden_size * (rows + received)
    return {part: size for part, size in table.items() if size}


def _experts_of_layer(layout: Layout) -> int:
    model, a, num_tokens = layout.model, layout.product_bytes, layout.tokens_of_pass
    d, f, k = model.hidden_size, model.intermediate_size, model.top_k
    # in float32 it is the tensor that the router keeps
    is_shared = layout.dtype == "float32" and layout.expert_parallel_size == 1
    rows_in = 0 if is_shared else a * d * (k if layout.expert_parallel_size > 1 else 1)
    if layout.experts.recompute:
        return num_tokens * rows_in
    if layout.experts.backend in _KEEP_ALL:
        return num_tokens * (k * a * (2 * d + 4 * f) + (rows_in if a < 4 else 0))
    return num_tokens * (rows_in + k * a * 2 * f)


def _keeps_received(layout: Layout) -> bool:
    """Whether the rows that arrived are counted with the experts, as their input."""
    return layout.experts.recompute or layout.experts.backend not in _KEEP_ALL


def _weight_copies(layout: Layout, num_layers: int) -> int:
    model = layout.model
    table = model.parameter_table()
    in_layers = table.get("attention", 0) + table.get("feed_forward", 0)
    in_layers += table.get("experts", 0) // layout.expert_parallel_size
    head = model.vocab_size * model.hidden_size
    return layout.product_bytes * (in_layers * num_layers // model.num_layers + head)


def loss_buffers(layout: Layout) -> int:
    """Bytes beside the logits when the backward pass begins: their gradient, and a chunk of them
    in float32 (moe/train/cross_entropy.py), two where they must be widened first."""
    logits = layout.tokens_of_pass * layout.model.vocab_size
    num_chunks = 2 if layout.product_bytes < 4 else 1
    return logits * layout.product_bytes + num_chunks * min(_CHUNK_BYTES, 4 * logits)


def backward_buffers(layout: Layout) -> int:
    """Bytes of one layer's largest gradients, beside what it keeps: of its weights in the products'
    dtype, and of the experts' rows, K (2 a F + 2 a D) a token (a dense block: 3 a F + a D)."""
    model, a, num_tokens = layout.model, layout.product_bytes, layout.tokens_of_pass
    d, f = model.hidden_size, model.intermediate_size
    if model.is_sparse:
        rows = num_tokens * model.top_k * a * (2 * f + 2 * d)
    else:
        rows = num_tokens * a * (3 * f + d)
    has_copies = layout.dtype == "bfloat16" and not layout.bf16_parameters
    return rows + (a * _largest(layout) if has_copies else 0)


def _largest(layout: Layout) -> int:
    """Elements of the largest parameter that a rank holds."""
    return max(size for group in held_groups(layout) for size in group.sizes)


def without_checkpointing(layout: Layout) -> Layout:
    """The same layout, with everything kept."""
    return dataclasses.replace(layout, activation_checkpointing=False)
