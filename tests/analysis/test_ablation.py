"""What taking an expert away costs: exact means, paired intervals, and who is hurt most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from analysis.ablation import ablation_effect


def measured(seed: int, documents: int = 60, harm: float = 0.0) -> dict[str, Any]:
    """Losses of documents that differ much; ablation 0 harms domain 1 only, ablation 1 nothing."""
    source = np.random.default_rng(seed)
    length_C = source.integers(5, 40, size=documents)
    document_T = np.repeat(np.arange(documents) * 3, length_C)
    domain_T = (document_T // 3) % 3
    hardness_C = source.normal(size=documents, scale=2.0)
    loss_T = 5 + np.repeat(hardness_C, length_C) + source.normal(size=len(document_T))
    ablated_AT = loss_T + source.normal(size=(2, len(document_T)), scale=0.1)
    ablated_AT[0] += harm * (domain_T == 1)
    return {
        "loss_T": loss_T, "ablated_loss_AT": ablated_AT, "domain_T": domain_T,
        "document_T": document_T, "num_domains": 4,
    }  # fmt: skip


def test_effects_are_differences_of_means_by_hand() -> None:
    found = ablation_effect(
        np.array([1.0, 2.0, 3.0, 4.0]),
        np.array([[1.5, 2.5, 3.0, 3.0]]),
        domain_T=np.array([0, 0, 1, 1]),
        document_T=np.array([0, 1, 2, 3]),
        num_domains=2,
    )
    assert found.by_domain.estimate.tolist() == [[0.5, -0.5]]
    assert found.overall.estimate.tolist() == [0.0]
    assert found.selectivity.estimate.tolist() == [[1.0, -1.0]]
    assert found.by_domain.low[0, 0] == found.by_domain.high[0, 0] == 0.5
    assert found.token_D.tolist() == [2, 2]
    assert found.document_D.tolist() == [2, 2]


def test_effects_equal_a_loop_and_tokens_without_a_loss_are_left_out() -> None:
    given = measured(0)
    given["loss_T"][::7] = np.nan
    given["ablated_loss_AT"][:, ::7] = np.nan
    found = ablation_effect(**given, num_samples=100)
    for ablation in range(2):
        change = given["ablated_loss_AT"][ablation] - given["loss_T"]
        for domain in range(3):
            inside = (given["domain_T"] == domain) & ~np.isnan(change)
            outside = (given["domain_T"] != domain) & ~np.isnan(change)
            np.testing.assert_allclose(
                found.by_domain.estimate[ablation, domain], change[inside].mean()
            )
            np.testing.assert_allclose(
                found.selectivity.estimate[ablation, domain],
                change[inside].mean() - change[outside].mean(),
            )
            assert found.token_D[domain] == inside.sum()
        np.testing.assert_allclose(found.overall.estimate[ablation], np.nanmean(change))
    assert np.isnan(found.by_domain.estimate[:, 3]).all(), "a domain without tokens"
    assert np.isnan(found.by_domain.high[:, 3]).all()
    assert np.isfinite(found.by_domain.high[:, :3]).all()


def test_a_small_harm_to_one_domain_is_found_under_documents_that_differ_much() -> None:
    found = ablation_effect(**measured(1, harm=0.05))
    assert found.by_domain.excludes_zero.tolist() == [[False, True, False, False], [False] * 4]
    assert found.selectivity.excludes_zero[0, 1]
    assert not found.selectivity.excludes_zero[1].any()
    assert found.by_domain.low[0, 1] < 0.05 < found.by_domain.high[0, 1]


def test_the_order_of_tokens_does_not_matter() -> None:
    given = measured(2)
    order = np.random.default_rng(0).permutation(len(given["loss_T"]))
    mixed = {
        name: value[..., order] if isinstance(value, np.ndarray) else value
        for name, value in given.items()
    }
    one, two = ablation_effect(**given, num_samples=50), ablation_effect(**mixed, num_samples=50)
    np.testing.assert_allclose(one.by_domain.low, two.by_domain.low)


def test_losses_that_do_not_fit_are_refused() -> None:
    given = measured(0)
    with pytest.raises(ValueError, match=r"must be \(T,\), \(A, T\)"):
        ablation_effect(**given | {"domain_T": given["domain_T"][:-1]})
    with pytest.raises(ValueError, match="two domains"):
        ablation_effect(**given | {"document_T": np.zeros_like(given["document_T"])})
    with pytest.raises(ValueError, match="outside 0 to 1"):
        ablation_effect(**given | {"num_domains": 2})
    broken = given["ablated_loss_AT"].copy()
    broken[1, 5] = np.nan
    with pytest.raises(ValueError, match="non-finite losses of tokens that loss_T has"):
        ablation_effect(**given | {"ablated_loss_AT": broken})
    with pytest.raises(ValueError, match="no finite loss"):
        ablation_effect(**given | {"loss_T": np.full_like(given["loss_T"], np.nan)})
