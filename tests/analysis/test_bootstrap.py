"""Intervals: against loops, in what they cover, and where there can be none."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from analysis.bootstrap import Interval, bootstrap, bootstrap_deviation, side_by_side
from analysis.utilisation import coefficient_of_variation, load_fraction


def ratio(total: np.ndarray, token: np.ndarray) -> np.ndarray:
    return total / token[..., None]


def documents(seed: int, number: int = 40) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(seed)
    token_C = source.integers(1, 100, size=number)
    total_CX = source.gamma(0.5, size=(number, 3)) * token_C[:, None]
    return total_CX, token_C


def loop_bca(
    total_CX: np.ndarray, token_C: np.ndarray, *, seed: int, samples: int, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Efron's formulas as written, one stratum, one number at a time."""
    size, normal = len(token_C), NormalDist()
    weight = np.random.default_rng(seed).multinomial(size, [1 / size] * size, size=samples)
    bounds = []
    for x in range(total_CX.shape[1]):
        estimate = total_CX[:, x].sum() / token_C.sum()
        drawn = sorted((w @ total_CX[:, x]) / (w @ token_C) for w in weight)
        bias = normal.inv_cdf(sum(d < estimate for d in drawn) / samples)
        left = np.array(
            [np.delete(total_CX[:, x], c).sum() / np.delete(token_C, c).sum() for c in range(size)]
        )
        influence = left.mean() - left
        skew = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
        pair = []
        for share in ((1 - level) / 2, (1 + level) / 2):
            shift = bias + normal.inv_cdf(share)
            pair.append(np.quantile(drawn, normal.cdf(bias + shift / (1 - skew * shift))))
        bounds.append(pair)
    return tuple(np.array(bounds).T)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bounds_are_those_of_the_formulas(level: float) -> None:
    total_CX, token_C = documents(0)
    found = bootstrap([total_CX, token_C], ratio, num_samples=500, level=level, seed=3)
    low, high = loop_bca(total_CX, token_C, seed=3, samples=500, level=level)
    np.testing.assert_allclose(found.estimate, total_CX.sum(0) / token_C.sum())
    # the acceleration leaves documents out about the estimate, the loop about their mean
    width = high - low
    assert (np.abs(found.low - low) < 0.02 * width).all()
    assert (np.abs(found.high - high) < 0.02 * width).all()
    assert found.num_clusters == 40


def test_the_skew_of_a_total_is_that_of_the_documents() -> None:
    # leaving a document out must not make the total smaller: the others stand in for it
    value_C = np.random.default_rng(0).gamma(0.3, size=60)
    found = bootstrap([value_C], lambda total: total, num_samples=2000, seed=1)
    ratio_to_tokens = bootstrap([value_C, np.ones(60)], lambda a, b: 60 * a / b, num_samples=2000,
                                seed=1)  # fmt: skip
    np.testing.assert_allclose([found.low, found.high], [ratio_to_tokens.low, ratio_to_tokens.high])


def test_a_stratum_of_one_document_shifts_the_interval_and_leaves_its_shape() -> None:
    value_C = np.append(np.random.default_rng(0).gamma(0.3, size=60), 5.0)
    is_one = np.arange(61) == 60

    def difference(total: np.ndarray, token: np.ndarray) -> np.ndarray:
        return total[:, 0] / token[:, 0] - total[:, 1] / token[:, 1]

    split = np.stack([~is_one, is_one], axis=1)
    found = bootstrap([value_C[:, None] * split, split], difference, stratum_C=is_one)
    alone = bootstrap([value_C[:60], np.ones(60)], lambda total, token: total / token)
    np.testing.assert_allclose([found.low + 5, found.high + 5], [alone.low, alone.high])


def test_a_skewed_mean_has_a_longer_upper_side() -> None:
    total_CX, token_C = documents(1, number=200)
    found = bootstrap([total_CX, token_C], ratio)
    assert ((found.high - found.estimate) > 1.05 * (found.estimate - found.low)).all()


def test_the_same_seed_gives_the_same_interval_and_another_nearly() -> None:
    sums = documents(0, number=150)
    one, same, other = (bootstrap(sums, ratio, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.low, same.low)
    assert (one.low != other.low).any()
    np.testing.assert_allclose(one.low, other.low, rtol=0.1)


def test_the_order_of_documents_and_empty_ones_matter_little_or_not() -> None:
    total_CX, token_C = documents(0, number=150)
    plain = bootstrap([total_CX, token_C], ratio)
    padded = bootstrap([np.insert(total_CX, 5, 0, axis=0), np.insert(token_C, 5, 0)], ratio)
    np.testing.assert_array_equal(plain.low, padded.low)
    assert padded.num_clusters == 150
    order = np.random.default_rng(0).permutation(150)
    mixed = bootstrap([total_CX[order], token_C[order]], ratio)
    np.testing.assert_allclose(mixed.estimate, plain.estimate)
    np.testing.assert_allclose(mixed.high, plain.high, rtol=0.1)


def test_what_differs_between_strata_only_does_not_widen_the_interval() -> None:
    # documents of a domain are alike: all the spread is between domains
    total_CX = np.repeat([[1.0], [9.0]], 30, axis=0)
    stratum_C = np.repeat([0, 1], 30)
    token_C = np.ones(60)
    within = bootstrap([total_CX, token_C], ratio, stratum_C=stratum_C)
    assert within.low == within.high == within.estimate == 5.0
    across = bootstrap([total_CX, token_C], ratio)
    assert across.high - across.low > 1.0


def test_pairs_are_compared_document_by_document() -> None:
    total_CX, token_C = documents(0)
    better = total_CX - 0.01 * token_C[:, None]  # a little better in every document alike
    found = bootstrap(
        [total_CX, better, token_C], lambda a, b, token: ratio(b, token) - ratio(a, token)
    )
    np.testing.assert_allclose(found.estimate, -0.01)
    np.testing.assert_allclose(found.low, -0.01)
    assert found.excludes_zero.all()
    sums = side_by_side([total_CX, token_C], [better, token_C])
    apart = bootstrap(
        sums,
        lambda a, token_a, b, token_b: ratio(b, token_b) - ratio(a, token_a),
        stratum_C=np.repeat([0, 1], 40),
    )
    np.testing.assert_allclose(apart.estimate, -0.01)
    assert not apart.excludes_zero.any(), "other documents would hide so small a difference"


def counts_of_documents(seed: int, share_E: np.ndarray, number: int) -> np.ndarray:
    source = np.random.default_rng(seed)
    share_CE = source.dirichlet(share_E * 10, size=number)
    length_C = source.integers(50, 500, size=number)
    return np.array([source.multinomial(n, p) for n, p in zip(length_C, share_CE, strict=True)])


@pytest.mark.parametrize(
    ("name", "share_E"),
    [
        ("uneven", np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02])),
        ("nearly even", np.full(16, 1 / 16) + np.linspace(-0.03, 0.03, 16)),
        ("even", np.full(16, 1 / 16)),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(name: str, share_E: np.ndarray) -> None:
    trials = 120
    share, deviation, plain = 0, 0, 0
    truth = float(coefficient_of_variation(share_E))
    for seed in range(trials):
        count_CE = counts_of_documents(seed, share_E, 100)
        found = bootstrap([count_CE], load_fraction, num_samples=400, seed=seed)
        share += np.mean((found.low <= share_E) & (share_E <= found.high))
        found = bootstrap_deviation([count_CE], coefficient_of_variation, num_samples=400)
        deviation += found.low - 1e-9 <= truth <= found.high + 1e-9
        found = bootstrap([count_CE], coefficient_of_variation, num_samples=400)
        plain += found.low <= truth <= found.high
    assert 0.91 < share / trials < 0.98
    assert deviation / trials > 0.91
    if name == "even":
        assert plain / trials < 0.05, "why deviations have an interval of their own"
        assert deviation / trials > 0.97


def test_what_has_no_interval_says_so() -> None:
    one = bootstrap([np.array([[3.0]]), np.array([2.0])], ratio)
    assert one.estimate == 1.5
    assert np.isnan(one.low)
    assert np.isnan(one.high)
    assert not one.excludes_zero
    nothing = bootstrap([np.zeros((4, 1))], lambda total: total)
    assert nothing.num_clusters == 0
    assert np.isnan(nothing.high)
    # a domain that some samples draw no token of
    with np.errstate(invalid="ignore", divide="ignore"):
        found = bootstrap(
            [np.eye(3), np.array([[1.0, 0], [1, 0], [0, 1]])], lambda a, b: a[:, :2] / b
        )
    assert np.isnan(found.low[1])
    assert isinstance(found, Interval)


def test_wrong_arguments_are_refused() -> None:
    good = np.ones((4, 2))
    with pytest.raises(ValueError, match="one row for each cluster"):
        bootstrap([good, np.ones(3)], ratio)
    with pytest.raises(ValueError, match="one row for each cluster"):
        bootstrap([good], lambda a: a, stratum_C=[0, 1])
    with pytest.raises(ValueError, match="at least one array"):
        bootstrap([], ratio)
    with pytest.raises(ValueError, match=r"level 1\.5"):
        bootstrap([good], lambda a: a, level=1.5)
    with pytest.raises(ValueError, match="first axis must be that of its arguments"):
        bootstrap([good], lambda a: a.sum(axis=0))
