"""The mask in numpy is the router's own, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phi_kernels import reference

from analysis.sparsemixer_mask import masked_fraction, num_survivors


def survivors_of_the_router(logit_TE: torch.Tensor, expert_TK: torch.Tensor, threshold: float):
    stage_TE, stages = logit_TE, []
    for k in range(2):
        gate_TE, _ = reference._masked(logit_TE, stage_TE, threshold)
        stages.append((gate_TE > float("-inf")).sum(dim=1))
        stage_TE = logit_TE.scatter(1, expert_TK[:, k : k + 1], float("-inf"))
    return torch.stack(stages, dim=1).numpy()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_experts=st.integers(2, 16),
    threshold=st.sampled_from([0.0, 0.01, 0.1, 0.3]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    is_sampled=st.booleans(),
)
def test_survivors_are_those_of_the_router(
    seed: int, num_experts: int, threshold: float, scale: float, is_sampled: bool
) -> None:
    source = torch.Generator().manual_seed(seed)
    logit_TE = torch.randn(50, num_experts, generator=source) * scale
    # near and at the threshold, ties, zeros and negative maxima
    logit_TE[:5] = logit_TE[:5, :1] * (1 - 2 * threshold)
    logit_TE[:5, 0] /= 1 - 2 * threshold
    logit_TE[5:8] = 0.0
    logit_TE[8:20] = -logit_TE[8:20].abs() - 0.1
    if is_sampled:
        sample = torch.rand(50, 2, num_experts, generator=source).clamp(1e-6, 1 - 1e-6)
        heun = torch.rand(50, 2, generator=source)
        _, expert_TK, _ = reference.sparsemixer(
            logit_TE, threshold=threshold, sample_TKE=sample, heun_TK=heun
        )
    else:
        _, expert_TK, _ = reference.sparsemixer(logit_TE, threshold=threshold)
    expected = survivors_of_the_router(logit_TE, expert_TK, threshold)
    found = num_survivors(logit_TE.numpy(), expert_TK.numpy(), threshold=threshold)
    np.testing.assert_array_equal(found, expected)


def test_one_survivor_is_weight_one() -> None:
    logit_TE = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    weight_TK, expert_TK, _ = reference.sparsemixer(logit_TE, threshold=0.01)
    alone = num_survivors(logit_TE.numpy(), expert_TK.numpy(), threshold=0.01) == 1
    np.testing.assert_array_equal(alone, weight_TK.numpy() == 1.0)
    # the facts of the released code: about 0.95 and 0.94 for independent normal logits
    np.testing.assert_allclose(alone.mean(axis=0), [0.95, 0.94], atol=0.01)


def test_the_test_vectors_of_the_released_code() -> None:
    logit = np.array(
        [[2.0, 1.99, 1.0, -3.0], [-1.0, -1.01, -2.0, -5.0], [0.5, 0.4, 0.396, 0.393]], np.float32
    )
    expert = np.array([[0, 1], [0, 1], [0, 1]])
    # weights 0.5025 and 1; 0.5025 and 1; 1 and 0.334556 (three within 2 %)
    left = num_survivors(logit, expert, threshold=0.01)
    assert left.tolist() == [[2, 1], [2, 1], [1, 3]]
    fraction = masked_fraction(logit, expert, threshold=0.01)
    np.testing.assert_allclose(fraction, [[1 / 2, 2 / 3], [1 / 2, 2 / 3], [3 / 4, 0]])


def test_layers_are_kept_and_extremes_reached() -> None:
    logit = np.random.default_rng(0).normal(size=(7, 3, 8)).astype(np.float32)
    expert = np.argsort(-logit, axis=-1)[..., :2]
    whole = num_survivors(logit, expert, threshold=0.02)
    assert whole.shape == (7, 3, 2)
    flat = num_survivors(logit.reshape(-1, 8), expert.reshape(-1, 2), threshold=0.02)
    np.testing.assert_array_equal(whole.reshape(-1, 2), flat)
    nothing = masked_fraction(logit, expert, threshold=1e9)
    np.testing.assert_array_equal(nothing, 0.0)
    everything = masked_fraction(logit, expert, threshold=0.0)
    np.testing.assert_allclose(everything, np.broadcast_to([7 / 8, 6 / 7], (7, 3, 2)))


def test_other_routers_are_refused() -> None:
    with pytest.raises(ValueError, match="SparseMixer chooses two"):
        num_survivors(np.zeros((5, 4), np.float32), np.zeros((5, 3), int), threshold=0.01)
    with pytest.raises(ValueError, match="at least 2"):
        num_survivors(np.zeros((5, 1), np.float32), np.zeros((5, 2), int), threshold=0.01)
