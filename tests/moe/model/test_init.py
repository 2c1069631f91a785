"""What parameters start from depends on seed and name, not on who draws how much of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from moe.model import init
from moe.model.init import KeptPart
from moe.model.transformer import build_model
from moe.model_config import ModelConfig

MODEL = ModelConfig(
    name="small", vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=8, intermediate_size=12, num_experts=4, top_k=2, initializer_range=0.5,
)  # fmt: skip
PIECE = 37  # of each parameter, from element 11 on


def drawn_by(label: str, *shape: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def test_a_parameter_of_one_block_is_one_draw_by_its_name_and_an_expert_by_its_number() -> None:
    model = dict(build_model(MODEL, seed=7).named_parameters())
    assert torch.equal(model["embed.weight"], drawn_by("7/embed.weight", 32, 16))
    name = next(name for name in model if name.endswith("experts.down"))
    for expert in range(4):
        assert torch.equal(
            model[name][expert], drawn_by(f"7/{name}/{expert}", *model[name].shape[1:])
        )


def test_what_is_kept_of_a_parameter_is_the_same_numbers_from_fewer_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(init, "BLOCK_NUMBERS", 32)
    whole = dict(build_model(MODEL, seed=7).named_parameters())
    sizes = []
    monkeypatch.setattr(
        init, "_draw", lambda label, size, draw=init._draw: sizes.append(size) or draw(label, size)
    )
    kept: dict[int, Tensor] = {}

    def keep(module: nn.Module) -> Mapping[str, KeptPart]:
        parts = {}
        for name, parameter in module.named_parameters(recurse=False):
            kept[id(parameter)] = parameter.detach().view(-1)[11 : 11 + PIECE].clone()
            parts[name] = KeptPart(kept[id(parameter)], 11)
        return parts

    model = build_model(MODEL, seed=7, when_ready=keep)
    for name, parameter in model.named_parameters():
        there = whole[name].detach().view(-1)[11 : 11 + PIECE]
        assert torch.equal(kept[id(parameter)], there), name
    blocks = 2  # 37 elements from the 11th on, in blocks of 32
    assert sum(sizes) <= len(whole) * blocks * 32


def test_parameters_that_are_loaded_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_draw", lambda label, size: pytest.fail(f"drew {label}"))
    model = build_model(MODEL, seed=None)
    assert all(not parameter.any() for parameter in model.parameters())
