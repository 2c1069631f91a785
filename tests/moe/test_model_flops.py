"""FLOPs against torch's counter, and visible pairs against the attention rules, one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.config import ExpertsConfig, RouterConfig
from moe.config_from_dict import from_dict
from moe.model.attention import attention_mask
from moe.model.transformer import build_model
from moe.model_config import ModelConfig
from moe.model_flops import (
    all_visible_pairs,
    block_pattern,
    decode_flops,
    forward_flops_per_token,
    num_blocks_before,
    visible_pairs,
)
from moe.train.throughput import model_flops_per_token

MODELS = Path(__file__).parents[2] / "conf/model"


def tiny(name: str, **changes: Any) -> ModelConfig:
    values: Any = OmegaConf.to_container(OmegaConf.load(MODELS / f"{name}.yaml"))
    return dataclasses.replace(from_dict(ModelConfig, values), **changes)


def pairs_one_by_one(model: ModelConfig, *, layer: int, seq_len: int) -> int:
    """Build every head's mask and count its ones."""
    place = torch.arange(seq_len)
    if model.block_sparse.is_sparse_layer(layer):
        pattern = block_pattern(model)
        return sum(
            int(pattern.sees(place[:, None], place[None], phase=phase).sum()) * len(heads)
            for phase, heads in pattern.heads_by_phase(model.num_heads).items()
        )
    mask = attention_mask(
        num_queries=seq_len, num_keys=seq_len, document_BS=torch.zeros(1, seq_len),
        padding_B=None, window=model.sliding_window, device=place.device,
    )  # fmt: skip
    assert mask is not None
    return int(mask.sum()) * model.num_heads


@pytest.mark.parametrize("seq_len", [1, 7, 8, 9, 32, 33, 100, 127, 128, 129, 257])
@pytest.mark.parametrize(
    "name", ["phi3_small_8k_tiny", "phi3_mini_4k_tiny", "phi3_medium_128k_tiny", "grin_moe_tiny"]
)
def test_visible_pairs_are_those_of_the_masks(name: str, seq_len: int) -> None:
    model = tiny(name)
    counted = [pairs_one_by_one(model, layer=i, seq_len=seq_len) for i in range(model.num_layers)]
    found = [visible_pairs(model, layer=i, seq_len=seq_len) for i in range(model.num_layers)]
    assert found == counted
    assert all_visible_pairs(model, seq_len) == sum(counted)


@pytest.mark.parametrize("is_same", [True, False])
@pytest.mark.parametrize(("local", "stride", "heads"), [(1, 3, 4), (2, 1, 2), (5, 8, 3)])
def test_other_patterns_are_counted_too(local: int, stride: int, heads: int, is_same: bool) -> None:
    model = tiny("phi3_small_8k_tiny", num_heads=heads, num_kv_heads=1)
    sparse = dataclasses.replace(
        model.block_sparse, num_local_blocks=local, vertical_stride=stride, block_size=5,
        is_same_for_all_heads=is_same, dense_every=0,
    )  # fmt: skip
    model = dataclasses.replace(model, block_sparse=sparse)
    for seq_len in (4, 5, 61):
        expected = pairs_one_by_one(model, layer=0, seq_len=seq_len)
        assert visible_pairs(model, layer=0, seq_len=seq_len) == expected


def test_phi_3_smalls_density_in_whole_blocks_is_the_known_one() -> None:
    pattern = block_pattern(tiny("phi3_small_8k"))
    for seq_len, density in ((1024, 1.0), (2048, 0.775), (8192, 0.329), (131_072, 0.139)):
        num = seq_len // pattern.block_size
        seen = [
            num_blocks_before(pattern, block, phase=phase) + 1
            for phase in range(pattern.vertical_stride)
            for block in range(num)
        ]
        share = sum(seen) / pattern.vertical_stride / (num * (num + 1) / 2)
        assert share == pytest.approx(density, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "seq_len"),
    [
        ("phi3_mini_4k_tiny", 64),
        ("phi3_medium_4k_tiny", 64),
        ("phi35_moe_tiny", 64),
        ("phi3_small_8k_tiny", 32),  # up to here its sparse layers see what dense ones see
    ],
)
def test_torch_counts_the_same_in_a_forward_pass_of_the_real_model(name: str, seq_len: int) -> None:
    config = tiny(name)
    model = build_model(config, RouterConfig(), ExpertsConfig("reference"), seed=0).eval()
    tokens = torch.randint(0, 512, (2, seq_len))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens)  # plain products: torch does not count its fused attention on the CPU
    table = forward_flops_per_token(config, seq_len)
    # torch counts a query with every key, seen or not
    unmasked = 4 * config.num_layers * config.num_heads * config.head_dim * seq_len
    expected = sum(table.values()) - table["scores"] + unmasked
    assert counter.get_total_flops() / (2 * seq_len) == pytest.approx(expected, rel=1e-9)
    assert model_flops_per_token(config, seq_len) == 3 * sum(table.values())


def test_a_decoded_token_costs_what_the_last_place_of_the_whole_text_does() -> None:
    for name in ("phi3_small_8k_tiny", "phi3_mini_4k_tiny", "phi35_moe_tiny"):
        model = tiny(name)
        whole = [n * sum(forward_flops_per_token(model, n).values()) for n in (200, 201)]
        assert decode_flops(model, 200) == pytest.approx(whole[1] - whole[0], rel=1e-9)


def test_sparse_and_dense_layers_are_counted_apart() -> None:
    model = tiny("phi3_small_8k")
    scores = forward_flops_per_token(model, 8192)["scores"]
    dense = 4 * 4096 * 8193 / 2  # of one layer
    # token by token 0.324: the triangle of a query's own block is a small part of the whole
    assert scores == pytest.approx(16 * dense + 16 * dense * 0.32418, rel=1e-5)
