"""Which rows of our tensors are which rows of a Hugging Face checkpoint's: one table, both ways.

A tensor is seen as rows of its last dimension (a vector: rows of one number). A link says that
num_rows rows on our side are, byte for byte, num_rows rows on theirs. Each row of either side is in
exactly one link, so reading the table from left to right exports and from right to left imports.

| ours | phi3 | phimoe | phi3small |
|---|---|---|---|
| attention.query, key, value | qkv_proj: all query rows, all key rows, all value rows | q_proj, k_proj, v_proj | query_key_value: for each key-value head its query heads, its key, its value |
| feed_forward.gate_up (gate above up) | gate_up_proj, the same order | | up_proj: even rows are the gate, odd rows the other part |
| experts.gate_up[e] | | experts.e.w1 above experts.e.w3 | |
| experts.down[e] | | experts.e.w2 | |

Sources: transformers 4.57 and 5.23 modeling_phi3 and modeling_phimoe, vLLM's phi3_small.
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from moe.model_config import ModelConfig

Shape = tuple[int, ...]


class Rows(NamedTuple):
    """Rows first, first + step, first + 2 step, ... of a tensor."""

    key: str
    first: int = 0
    step: int = 1


class Link(NamedTuple):
    """These rows of ours are those rows of theirs."""

    ours: Rows
    theirs: Rows
    num_rows: int


class Piece(NamedTuple):
    """A link with a direction: rows of a source tensor that are rows of a target tensor."""

    source: Rows
    target: Rows
    num_rows: int


@dataclass
class TensorMap:
    """Shapes of both sides by key, in the order of the model, and the links between them."""

    ours: dict[str, Shape] = field(default_factory=dict)
    theirs: dict[str, Shape] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)

    def same(self, ours: str, theirs: str, shape: Shape) -> None:
        """Add a tensor that is whole and alike on both sides."""
        self.ours[ours] = self.theirs[theirs] = shape
        self.links.append(Link(Rows(ours), Rows(theirs), num_rows(shape)))

    def into_ours(self) -> dict[str, list[Piece]]:
        """The pieces of each of our tensors, in the order of its rows."""
        return _by_target(Piece(link.theirs, link.ours, link.num_rows) for link in self.links)

    def into_theirs(self) -> dict[str, list[Piece]]:
        """The pieces of each of their tensors, in the order of its rows."""
        return _by_target(Piece(link.ours, link.theirs, link.num_rows) for link in self.links)


def num_rows(shape: Shape) -> int:
    """Rows of a tensor: all its dimensions but the last, or the length of a vector."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def tensor_map(model: ModelConfig, *, family: str, fused_experts: bool = False) -> TensorMap:
    """The table for a model of this family ("phi3", "phimoe", "phi3small").

    fused_experts: phimoe with the names that transformers 5 has in memory (.mlp.router,
    .mlp.experts.gate_up_proj) instead of those it writes to disk.
    """
    table = TensorMap()
    width = model.hidden_size
    table.same("embed.weight", "model.embed_tokens.weight", (model.vocab_size, width))
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        _norm(table, model, f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        _ATTENTION[family](table, model, f"{ours}.attention", f"{theirs}.self_attn")
        _norm(table, model, f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm")
        if model.is_sparse:
            _experts(table, model, f"{ours}.feed_forward", theirs, is_fused=fused_experts)
        else:
            _FEED_FORWARD[family](table, model, f"{ours}.feed_forward", f"{theirs}.mlp")
    _norm(table, model, "norm", f"model.{_FINAL_NORM.get(family, 'norm')}")
    if not model.tie_embeddings:
        table.same("head.weight", "lm_head.weight", (model.vocab_size, width))
    if model.head_bias:
        table.same("head.bias", "lm_head.bias", (model.vocab_size,))
    return table


def _norm(table: TensorMap, model: ModelConfig, ours: str, theirs: str) -> None:
    for kind in ("weight", "bias") if model.norm == "layernorm" else ("weight",):
        table.same(f"{ours}.{kind}", f"{theirs}.{kind}", (model.hidden_size,))


def _separate_attention(table: TensorMap, model: ModelConfig, ours: str, theirs: str) -> None:
    widths = _attention_rows(model)
    for kind, tail in _kinds(model.attention_bias, model.hidden_size):
        for name, rows in widths.items():
            table.same(f"{ours}.{name}.{kind}", f"{theirs}.{name[0]}_proj.{kind}", (rows, *tail))
    _output(table, model, f"{ours}.output", f"{theirs}.o_proj")


def _stacked_attention(table: TensorMap, model: ModelConfig, ours: str, theirs: str) -> None:
    widths = _attention_rows(model)
    for kind, tail in _kinds(model.attention_bias, model.hidden_size):
        stacked, first = f"{theirs}.qkv_proj.{kind}", 0
        for name, rows in widths.items():
            table.ours[f"{ours}.{name}.{kind}"] = (rows, *tail)
            table.links.append(Link(Rows(f"{ours}.{name}.{kind}"), Rows(stacked, first), rows))
            first += rows
        table.theirs[stacked] = (first, *tail)
    _output(table, model, f"{ours}.output", f"{theirs}.o_proj")


def _grouped_attention(table: TensorMap, model: ModelConfig, ours: str, theirs: str) -> None:
    widths = _attention_rows(model)
    for kind, tail in _kinds(model.attention_bias, model.hidden_size):
        stacked, first = f"{theirs}.query_key_value.{kind}", 0
        for name, rows in widths.items():
            table.ours[f"{ours}.{name}.{kind}"] = (rows, *tail)
        for group in range(model.num_kv_heads):
            for name, rows in widths.items():
                of_group = rows // model.num_kv_heads
                from_ours = Rows(f"{ours}.{name}.{kind}", group * of_group)
                table.links.append(Link(from_ours, Rows(stacked, first), of_group))
                first += of_group
        table.theirs[stacked] = (first, *tail)
    _output(table, model, f"{ours}.output", f"{theirs}.dense")


def _attention_rows(model: ModelConfig) -> dict[str, int]:
    width_kv = model.num_kv_heads * model.head_dim
    return {"query": model.num_heads * model.head_dim, "key": width_kv, "value": width_kv}


def _output(table: TensorMap, model: ModelConfig, ours: str, theirs: str) -> None:
    width_q = model.num_heads * model.head_dim
    for kind, tail in _kinds(model.attention_bias, width_q):
        table.same(f"{ours}.{kind}", f"{theirs}.{kind}", (model.hidden_size, *tail))


def _plain_feed_forward(table: TensorMap, model: ModelConfig, ours: str, theirs: str) -> None:
    for kind, tail in _kinds(model.feed_forward_bias, model.hidden_size):
        both = (2 * model.intermediate_size, *tail)
        table.same(f"{ours}.gate_up.{kind}", f"{theirs}.gate_up_proj.{kind}", both)
    _down(table, model, ours, theirs)


def _interleaved_feed_forward(table: TensorMap, model: ModelConfig, ours: str, theirs: str) -> None:
    width = model.intermediate_size
    for kind, tail in _kinds(model.feed_forward_bias, model.hidden_size):
        stacked, mixed = f"{ours}.gate_up.{kind}", f"{theirs}.up_proj.{kind}"
        table.ours[stacked] = table.theirs[mixed] = (2 * width, *tail)
        for part in range(2):  # 0: the gate, 1: the other
            from_ours, from_theirs = Rows(stacked, part * width), Rows(mixed, part, step=2)
            table.links.append(Link(from_ours, from_theirs, width))
    _down(table, model, ours, theirs)


def _down(table: TensorMap, model: ModelConfig, ours: str, theirs: str) -> None:
    for kind, tail in _kinds(model.feed_forward_bias, model.intermediate_size):
        table.same(f"{ours}.down.{kind}", f"{theirs}.down_proj.{kind}", (model.hidden_size, *tail))


def _experts(
    table: TensorMap, model: ModelConfig, ours: str, theirs: str, *, is_fused: bool
) -> None:
    width, inner, count = model.hidden_size, model.intermediate_size, model.num_experts
    gate_up, down = f"{ours}.experts.gate_up", f"{ours}.experts.down"
    if is_fused:
        table.same(f"{ours}.router.weight", f"{theirs}.mlp.router.weight", (count, width))
        shape_gate_up, shape_down = (count, 2 * inner, width), (count, width, inner)
        table.same(gate_up, f"{theirs}.mlp.experts.gate_up_proj", shape_gate_up)
        table.same(down, f"{theirs}.mlp.experts.down_proj", shape_down)
        return
    table.same(f"{ours}.router.weight", f"{theirs}.block_sparse_moe.gate.weight", (count, width))
    table.ours[gate_up], table.ours[down] = (count, 2 * inner, width), (count, width, inner)
    for expert in range(count):
        prefix = f"{theirs}.block_sparse_moe.experts.{expert}"
        for name, key, first, shape in (
            ("w1", gate_up, 2 * expert * inner, (inner, width)),
            ("w2", down, expert * width, (width, inner)),
            ("w3", gate_up, (2 * expert + 1) * inner, (inner, width)),
        ):
            table.theirs[f"{prefix}.{name}.weight"] = shape
            table.links.append(Link(Rows(key, first), Rows(f"{prefix}.{name}.weight"), shape[0]))


def _kinds(has_bias: bool, width: int) -> list[tuple[str, Shape]]:
    """("weight", the rest of its shape) and, with a bias, ("bias", ())."""
    return [("weight", (width,)), *([("bias", ())] if has_bias else [])]


def _by_target(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    made: dict[str, list[Piece]] = {}
    for piece in pieces:
        made.setdefault(piece.target.key, []).append(piece)
    for found in made.values():
        found.sort(key=lambda piece: piece.target.first)
    return made


_ATTENTION = {
    "phi3": _stacked_attention, "phimoe": _separate_attention, "phi3small": _grouped_attention,
}  # fmt: skip
_FEED_FORWARD = {"phi3": _plain_feed_forward, "phi3small": _interleaved_feed_forward}
_FINAL_NORM = {"phi3small": "final_layernorm"}
