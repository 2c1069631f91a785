"""Dropout by token: the share dropped, the scale, and masks that no division of work changes."""

from __future__ import annotations

import math

import pytest
import torch

from moe.model.dropout import dropout
from moe.sparse.noise import (
    PURPOSE_EMBEDDING_DROPOUT,
    PURPOSE_FEED_FORWARD_DROPOUT,
    token_keys,
)

EMBEDDING = {"layer": 0, "purpose": PURPOSE_EMBEDDING_DROPOUT}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_is_dropped_and_the_rest_scaled_so_that_the_mean_stays(share):
    x = torch.ones(8, 128, 100)
    got = dropout(x, token_keys(0, torch.arange(8), seq_len=128), share=share, **EMBEDDING)
    num_dropped = (got == 0).sum().item()
    # a binomial count: four standard deviations, and a resolution of 2^-16 of its share
    spread = 4 * math.sqrt(share * (1 - share) / x.numel()) + 2**-16
    assert num_dropped / x.numel() == pytest.approx(share, abs=spread)
    kept = got[got != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - share)))


def test_dropped_numbers_are_spread_over_tokens_and_places():
    got = dropout(
        torch.ones(8, 128, 100), token_keys(0, torch.arange(8), seq_len=128), share=0.5, **EMBEDDING
    )
    is_kept = (got != 0).float()
    # each token keeps 50 of 100, each place 512 of 1,024: five standard deviations
    assert (is_kept.sum(dim=2) - 50).abs().max() < 25
    assert (is_kept.sum(dim=(0, 1)) - 512).abs().max() < 80


def test_the_mask_of_a_token_depends_on_the_sample_and_not_on_its_batch():
    x = torch.randn(4, 32, 24)
    key_BS = token_keys(3, torch.tensor([40, 41, 42, 43]), seq_len=32)
    whole = dropout(x, key_BS, share=0.3, **EMBEDDING)
    rows = [dropout(x[i : i + 1], key_BS[i : i + 1], share=0.3, **EMBEDDING) for i in range(4)]
    assert torch.equal(torch.cat(rows), whole)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(dropout(x[order], key_BS[order], share=0.3, **EMBEDDING), whole[order])


def test_masks_differ_by_token_layer_purpose_and_seed():
    x = torch.ones(1, 2, 4096)

    def mask(seed=0, sample=0, layer=0, purpose=PURPOSE_EMBEDDING_DROPOUT):
        key_BS = token_keys(seed, torch.tensor([sample]), seq_len=2)
        return dropout(x, key_BS, share=0.5, layer=layer, purpose=purpose)[0] != 0

    first = mask()
    others = [
        first.flip(0),  # the other token
        mask(seed=1),
        mask(sample=1),
        mask(layer=1),
        mask(purpose=PURPOSE_FEED_FORWARD_DROPOUT),
    ]
    for other in others:
        # independent masks agree in half of 8,192 numbers: six standard deviations
        assert (first == other).float().mean().item() == pytest.approx(0.5, abs=0.035)


def test_nothing_is_dropped_without_keys_or_without_a_share():
    x = torch.randn(2, 3, 5)
    assert dropout(x, None, share=0.5, **EMBEDDING) is x
    assert dropout(x, token_keys(0, torch.arange(2), seq_len=3), share=0.0, **EMBEDDING) is x


def test_the_gradient_passes_where_the_number_did():
    x = torch.randn(2, 8, 16, requires_grad=True)
    got = dropout(x, token_keys(0, torch.arange(2), seq_len=8), share=0.25, **EMBEDDING)
    got.sum().backward()
    assert x.grad is not None
    expected = (got != 0).float() / 0.75
    assert torch.allclose(x.grad, expected)


def test_bfloat16_stays_bfloat16():
    x = torch.ones(1, 8, 16, dtype=torch.bfloat16)
    got = dropout(x, token_keys(0, torch.arange(1), seq_len=8), share=0.25, **EMBEDDING)
    assert got.dtype == torch.bfloat16
