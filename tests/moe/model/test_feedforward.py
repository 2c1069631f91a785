"""The dense feed-forward blocks: GEGELU and its limit to the very edge, SwiGLU, biases, dropout."""

from __future__ import annotations

import math

import pytest
import torch

from moe.model.feedforward import DenseFeedForward, gegelu, swiglu
from moe.model_config import ModelConfig
from moe.sparse.noise import token_keys

LIMIT = 20.0
INFINITY = math.inf


def gegelu_of(gate: float, up: float) -> float:
    """The formula in Python's floats: only finite numbers are limited."""
    gate = gate if math.isinf(gate) else min(gate, LIMIT)
    up = up if math.isinf(up) else max(-LIMIT, min(up, LIMIT))
    # infinity * sigmoid: the product of IEEE numbers, which -infinity * 0 makes nan
    sigmoid = 1 / (1 + math.exp(-1.702 * gate)) if gate > -400 else 0.0
    return gate * sigmoid * (up + 1)


@pytest.mark.parametrize("gate", [-30.0, -20.5, -1.0, 0.0, 0.3, 19.99, 20.0, 20.01, 1e6])
@pytest.mark.parametrize("up", [-1e6, -20.01, -20.0, -1.0, 0.0, 2.5, 20.0, 20.01, 1e6])
def test_gegelu_limits_the_gate_above_and_the_linear_part_on_both_sides(gate, up):
    got = gegelu(torch.tensor(gate), torch.tensor(up), limit=LIMIT).item()
    assert got == pytest.approx(gegelu_of(gate, up), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(
    ("gate", "up", "expected"),
    [
        (INFINITY, 1.0, INFINITY),  # not limited: 20 would give 40
        (INFINITY, -3.0, -INFINITY),
        (2.0, INFINITY, INFINITY),
        (2.0, -INFINITY, -INFINITY),
        (-INFINITY, 1.0, math.nan),  # -infinity * sigmoid(-infinity) is -infinity * 0
    ],
)
def test_gegelu_leaves_infinities_as_they_are(gate, up, expected):
    got = gegelu(torch.tensor(gate), torch.tensor(up), limit=LIMIT).item()
    assert got == expected or (math.isnan(got) and math.isnan(expected))


def gradients_of(gate: float, up: float, *, limit: float = LIMIT) -> tuple[float, float]:
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (gate, up)]
    gegelu(*leaves, limit=limit).backward()
    return tuple(leaf.grad.item() for leaf in leaves)


@pytest.mark.parametrize("gate", [-5.0, 0.0, 19.9])
@pytest.mark.parametrize("up", [-19.9, 0.0, 19.9])
def test_gegelu_has_the_gradient_of_its_formula_inside_the_limit(gate, up):
    step = 1e-5
    by_gate = (gegelu_of(gate + step, up) - gegelu_of(gate - step, up)) / (2 * step)
    by_up = (gegelu_of(gate, up + step) - gegelu_of(gate, up - step)) / (2 * step)
    assert gradients_of(gate, up) == pytest.approx((by_gate, by_up), rel=1e-6, abs=1e-8)


def test_gegelu_has_no_gradient_beyond_the_limit_and_one_at_it():
    beyond_gate, _ = gradients_of(20.01, 1.0)
    assert beyond_gate == 0.0
    assert gradients_of(-25.0, 1.0)[0] != 0.0  # the gate has no lower limit
    for up in (-20.01, 20.01):
        assert gradients_of(2.0, up)[1] == 0.0
    # at the limit itself the number is unchanged, and so is its gradient
    assert gradients_of(20.0, 1.0)[0] == pytest.approx(2.0, rel=1e-6)
    for up in (-20.0, 20.0):
        assert gradients_of(2.0, up)[1] == pytest.approx(gegelu_of(2.0, 0.0), rel=1e-6)


def test_gegelu_limits_in_bfloat16_too():
    got = gegelu(torch.tensor(50.0).bfloat16(), torch.tensor(50.0).bfloat16(), limit=LIMIT)
    assert got.dtype == torch.bfloat16
    assert got.item() == pytest.approx(20 * 21, rel=2**-8)


def test_swiglu_has_no_limit():
    got = swiglu(torch.tensor(50.0), torch.tensor(50.0), limit=LIMIT)
    assert got.item() == pytest.approx(2500.0)


CONFIG = ModelConfig(
    vocab_size=16, hidden_size=3, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=2,
    intermediate_size=5, num_experts=0, feed_forward="gegelu", feed_forward_bias=True,
    feed_forward_dropout=0.5,
)  # fmt: skip


def block_of(config: ModelConfig, *, layer: int = 0) -> DenseFeedForward:
    block = DenseFeedForward(config, layer=layer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return block


def test_the_first_rows_of_gate_up_are_the_gate_and_both_layers_have_biases():
    block = block_of(CONFIG)
    x = torch.tensor([0.3, -1.0, 2.0])
    rows = block.gate_up.weight @ x + block.gate_up.bias
    inside = [gegelu_of(rows[i].item(), rows[5 + i].item()) for i in range(5)]
    expected = block.down.weight @ torch.tensor(inside) + block.down.bias
    got, routing = block(x.view(1, 1, 3), None)
    assert routing is None
    assert torch.allclose(got[0, 0], expected, atol=1e-5)


def test_dropout_is_of_the_output_in_training_only_and_of_each_layer_its_own():
    x = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(1))
    key_BS = token_keys(0, torch.arange(2), seq_len=50)
    plain, _ = block_of(CONFIG)(x, None)
    dropped, _ = block_of(CONFIG)(x, key_BS)
    is_kept = dropped != 0
    assert torch.allclose(dropped[is_kept], 2.0 * plain[is_kept])
    assert is_kept.float().mean().item() == pytest.approx(0.5, abs=0.1)
    other, _ = block_of(CONFIG, layer=1)(x, key_BS)
    assert not torch.equal(other != 0, is_kept)
