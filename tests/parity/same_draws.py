"""Lets transformers' SparseMixer draw the numbers that ours draws, so that training is the same.

transformers draws from torch's generator, in the order of layers; ours are hashes of the token, the
layer and the purpose (moe/sparse/noise.py). Within `same_draws` each call for random numbers inside
modeling_phimoe gets ours: exponential numbers are -ln u of the uniform ones that ours compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from moe.config import RouterConfig
from moe.sparse.noise import (
    PURPOSE_EXPERT_SAMPLE,
    PURPOSE_HEUN,
    PURPOSE_INPUT_JITTER,
    symmetric,
    uniform,
)


@contextmanager
def same_draws(
    key_BS: Tensor, router: RouterConfig, *, num_layers: int, num_experts: int, width: int
) -> Iterator[list[Tensor]]:
    """Yield a list that receives each layer's chosen experts (T, 2) as transformers runs.

    Every draw must be used, in the order that transformers 5 makes them: for each layer the jitter
    of the block and that of the router (5.23 applies both, one after the other: the first is ours,
    the second 1), then for each of two experts the exponentials and Heun's uniform number.
    """
    from transformers.models.phimoe import modeling_phimoe

    key_T = key_BS.flatten()
    draws = iter(_draws_of(key_T, router, num_layers, num_experts, width))
    chosen: list[Tensor] = []
    original = modeling_phimoe.sparsemixer

    def next_draw(kind: str, shape: torch.Size) -> Tensor:
        expected, value = next(draws)
        assert expected == kind
        return value.view(shape)

    def exponential(tensor: Tensor) -> Tensor:
        return tensor.copy_(next_draw("exponential", tensor.shape))

    def rand_like(tensor: Tensor) -> Tensor:
        return next_draw("heun", tensor.shape)

    def uniform_in_place(tensor: Tensor, *bounds: float) -> Tensor:
        # without bounds it is the second Heun draw, torch.rand_like(...).uniform_()
        return tensor.copy_(next_draw("jitter", tensor.shape)) if bounds else tensor

    def recorded(*arguments, **named):
        weight_TK, expert_TK = original(*arguments, **named)
        chosen.append(expert_TK)
        return weight_TK, expert_TK

    with (
        patch.object(torch.Tensor, "exponential_", exponential),
        patch.object(torch.Tensor, "uniform_", uniform_in_place),
        patch.object(torch, "rand_like", rand_like),
        patch.object(modeling_phimoe, "sparsemixer", recorded),
    ):
        yield chosen
    assert next(draws, None) is None, "transformers made fewer draws than were prepared"


def _draws_of(
    key_T: Tensor, router: RouterConfig, num_layers: int, num_experts: int, width: int
) -> Iterator[tuple[str, Tensor]]:
    for layer in range(num_layers):
        if router.input_jitter > 0:
            noise = symmetric(key_T, layer=layer, purpose=PURPOSE_INPUT_JITTER, width=width)
            factor = 1.0 + router.input_jitter * noise
            yield from (("jitter", factor), ("jitter", torch.ones_like(factor)))
        sample = uniform(
            key_T, layer=layer, purpose=PURPOSE_EXPERT_SAMPLE, width=2 * num_experts
        ).view(-1, 2, num_experts)
        heun = uniform(key_T, layer=layer, purpose=PURPOSE_HEUN, width=2)
        for k in range(2):
            yield "exponential", -sample[:, k].log()
            yield "heun", heun[:, k]
