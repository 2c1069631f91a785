"""The counter-based numbers against big-integer arithmetic, and their distribution."""

from __future__ import annotations

import torch

from moe.sparse import noise
from moe.sparse.noise import symmetric, token_keys, uniform


def splitmix64_finaliser(z: int) -> int:
    """The published function on Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_the_hash_is_the_published_one():
    values = [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15, 123456789]
    tensor = torch.tensor([v - 2**64 if v >= 2**63 else v for v in values])
    assert [int(v) % 2**64 for v in noise._mix(tensor)] == [splitmix64_finaliser(v) for v in values]


def test_uniform_numbers_have_the_moments_of_the_uniform_distribution():
    key_T = token_keys(0, torch.arange(64), seq_len=128).flatten()
    draws = uniform(key_T, layer=1, purpose=2, width=16).double()
    num = draws.numel()
    assert draws.min() > 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 * (1 / 12 / num) ** 0.5
    assert abs(draws.var() - 1 / 12) < 4 * (1 / 180 / num) ** 0.5
    neighbours = (draws[:, 1:] - 0.5) * (draws[:, :-1] - 0.5)
    assert abs(neighbours.mean()) < 4 / 12 / num**0.5


def test_symmetric_numbers_fill_the_interval_evenly():
    key_T = token_keys(0, torch.arange(64), seq_len=128).flatten()
    draws = symmetric(key_T, layer=0, purpose=0, width=30).double()
    assert draws.shape == (64 * 128, 30)
    assert draws.abs().max() < 1
    assert abs(draws.mean()) < 4 * (1 / 3 / draws.numel()) ** 0.5
    assert abs(draws.square().mean() - 1 / 3) < 0.003


def test_seed_sample_place_layer_and_purpose_all_change_the_numbers():
    def draw(seed=0, sample=0, place=0, layer=0, purpose=0):
        key = token_keys(seed, torch.tensor([sample]), seq_len=4)[0, place : place + 1]
        return tuple(uniform(key, layer=layer, purpose=purpose, width=3)[0].tolist())

    varied = {
        draw(**{name: value})
        for name in ("seed", "sample", "place", "layer", "purpose")
        for value in (1, 2, 3)
    }
    assert len(varied | {draw()}) == 16
    assert draw(seed=7, sample=2**40, place=3) == draw(seed=7, sample=2**40, place=3)
