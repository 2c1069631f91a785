"""The table of rows: complete on both sides, and right by formulas written out here."""

from __future__ import annotations

import numpy as np
import pytest
from published_folders import CONFIGS, SHAPES, head_dim

from moe.convert.hf_config import read_hf_config
from moe.convert.tensor_map import TensorMap, num_rows, tensor_map


def table_of(name: str, *, fused_experts: bool = False) -> TensorMap:
    found = read_hf_config(CONFIGS[name], where="config.json")
    return tensor_map(found.model, family=found.family, fused_experts=fused_experts)


def rows_of_theirs(table: TensorMap, ours: str) -> list[tuple[str, int]]:
    """For each row of one of our tensors: their key and row."""
    found: dict[int, tuple[str, int]] = {}
    for link in table.links:
        for k in range(link.num_rows if link.ours.key == ours else 0):
            found[link.ours.first + k * link.ours.step] = (
                link.theirs.key, link.theirs.first + k * link.theirs.step,
            )  # fmt: skip
    return [found[row] for row in range(len(found))]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_row_of_both_sides_is_in_exactly_one_link(name):
    table = table_of(name)
    for side, shapes in (("ours", table.ours), ("theirs", table.theirs)):
        count = {key: np.zeros(num_rows(shape), int) for key, shape in shapes.items()}
        for link in table.links:
            rows = getattr(link, side)
            places = rows.first + rows.step * np.arange(link.num_rows)
            np.add.at(count[rows.key], places, 1)
        assert all((c == 1).all() for c in count.values()), side


@pytest.mark.parametrize("name", CONFIGS)
def test_their_keys_and_shapes_are_the_published_ones(name):
    config = CONFIGS[name]
    assert table_of(name).theirs == SHAPES[config["model_type"]](config)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_tensors_are_the_parameters_of_our_model(name):
    from moe.model.transformer import build_model

    found = read_hf_config(CONFIGS[name], where="config.json")
    model = build_model(found.model, found.router, device="meta")
    expected = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert table_of(name).ours == expected


def test_dense_queries_keys_and_values_follow_each_other():
    config, table = CONFIGS["phi3 gqa window"], table_of("phi3 gqa window")
    head = head_dim(config)
    stacked = "model.layers.1.self_attn.qkv_proj.weight"
    expected = [(stacked, row) for row in range(8 * head)]
    found = [
        row
        for name in ("query", "key", "value")
        for row in rows_of_theirs(table, f"blocks.1.attention.{name}.weight")
    ]
    assert found == expected


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_small_keeps_a_group_together(kind):
    """Row ((group * (ratio + 2)) + place) * head_dim + c: queries, then the key, then the value."""
    table, ratio, head, groups = table_of("phi3small"), 2, 8, 2
    stacked = f"model.layers.0.self_attn.query_key_value.{kind}"
    for h in range(ratio * groups):
        for c in range(head):
            expected = (h // ratio * (ratio + 2) + h % ratio) * head + c
            found = rows_of_theirs(table, f"blocks.0.attention.query.{kind}")[h * head + c]
            assert found == (stacked, expected)
    for g in range(groups):
        for c in range(head):
            for name, place in (("key", ratio), ("value", ratio + 1)):
                expected = (g * (ratio + 2) + place) * head + c
                found = rows_of_theirs(table, f"blocks.0.attention.{name}.{kind}")[g * head + c]
                assert found == (stacked, expected)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_small_has_the_gate_in_even_rows(kind):
    rows = rows_of_theirs(table_of("phi3small"), f"blocks.1.feed_forward.gate_up.{kind}")
    key = f"model.layers.1.mlp.up_proj.{kind}"
    assert rows == [(key, r) for r in range(0, 48, 2)] + [(key, r) for r in range(1, 48, 2)]


def test_an_expert_has_w1_above_w3():
    rows = rows_of_theirs(table_of("phimoe"), "blocks.0.feed_forward.experts.gate_up")
    prefix = "model.layers.0.block_sparse_moe.experts"
    expected = [
        (f"{prefix}.{expert}.{name}.weight", row)
        for expert in range(4)
        for name in ("w1", "w3")
        for row in range(24)
    ]
    assert rows == expected


def test_the_names_that_transformers_5_has_in_memory_hold_our_rows_in_order():
    table = table_of("phimoe", fused_experts=True)
    assert table.theirs["model.layers.0.mlp.experts.gate_up_proj"] == (4, 48, 32)
    assert table.theirs["model.layers.1.mlp.experts.down_proj"] == (4, 32, 24)
    assert "model.layers.1.mlp.router.weight" in table.theirs
    assert not any("block_sparse_moe" in key for key in table.theirs)
    rows = rows_of_theirs(table, "blocks.0.feed_forward.experts.down")
    assert rows == [("model.layers.0.mlp.experts.down_proj", r) for r in range(4 * 32)]
