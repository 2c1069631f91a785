"""How evenly each layer uses its experts, with intervals over documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.bootstrap import (
    Interval,
    bootstrap,
    bootstrap_deviation,
    side_by_side,
)
from analysis.routing_counts import RoutingCounts
from analysis.utilisation import (
    coefficient_of_variation,
    dead_experts,
    diversity,
    gini,
    load_ratio,
    max_violation,
)

Floats = NDArray[np.float64]

# 0 when all experts get the same; the names are those of the tables and figures
DEVIATIONS: dict[str, Callable[..., Floats]] = {
    "coefficient of variation": coefficient_of_variation,
    "max violation": max_violation,
    "gini": gini,
}


@dataclass(frozen=True, eq=False)
class Balance:
    """Numbers of each layer; definitions and sources in analysis.utilisation."""

    ratio: Interval  # (L, E) load over ideal
    deviation: dict[str, Interval]  # (L,) each, by its name in DEVIATIONS
    diversity: Interval  # (L,) exp(H) / E
    dead_LE: NDArray[np.bool_]  # chosen by no token; says nothing of tokens not traced


def balance(
    counts: RoutingCounts, *, num_samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Balance:
    """Load, its deviations and dead experts of each layer; documents are drawn again by domain.

    All domains together, weighted by their tokens: for one domain pass of_domain(counts, d).
    """
    choice_CLE, stratum_C = clusters_of(counts)
    given = {"num_samples": num_samples, "level": level, "seed": seed}
    deviation = {
        name: bootstrap_deviation([choice_CLE], function, stratum_C=stratum_C, **given)
        for name, function in DEVIATIONS.items()
    }
    # the entropy lacking to log E grows with the square of deviations, as noise does
    lack = bootstrap_deviation([choice_CLE], _root_of_lack, stratum_C=stratum_C, **given)
    return Balance(
        ratio=bootstrap([choice_CLE], load_ratio, stratum_C=stratum_C, **given),
        deviation=deviation,
        diversity=Interval(
            np.exp(-(lack.estimate**2)),
            np.exp(-(lack.high**2)),
            np.exp(-(lack.low**2)),
            level,
            lack.num_clusters,
        ),
        dead_LE=dead_experts(counts.load_LE),
    )


def compare_balance(
    one: RoutingCounts,
    two: RoutingCounts,
    *,
    is_paired: bool,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Each deviation of `two` less that of `one` by layer, (L,); below 0 where two is more even.

    is_paired: both traces are of the same documents, which are then drawn together; that takes
    what the documents have in common out of the interval. Layers must be as many; experts need
    not be, but deviations of different numbers of experts do not compare.
    """
    choice_one, stratum_one = clusters_of(one)
    choice_two, stratum_two = clusters_of(two)
    if choice_one.shape[1] != choice_two.shape[1]:
        raise ValueError(
            f"counts: {choice_one.shape[1]} and {choice_two.shape[1]} layers; compare as many."
        )
    if is_paired:
        if not np.array_equal(one.token_DG, two.token_DG):
            raise ValueError(
                "counts: tokens by domain and group differ, so the documents do; "
                "trace the same ones, or pass is_paired=False."
            )
        sums, stratum_C = [choice_one, choice_two], stratum_one
    else:
        sums = side_by_side([choice_one], [choice_two])
        stratum_C = np.concatenate([stratum_one, stratum_two + 1 + stratum_one.max()])
    return {
        name: bootstrap(
            sums,
            lambda first, second, function=function: function(second) - function(first),
            stratum_C=stratum_C,
            num_samples=num_samples,
            level=level,
            seed=seed,
            method="reflected",
        )
        for name, function in DEVIATIONS.items()
    }


def clusters_of(counts: RoutingCounts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choices (C, L, E) of each group of documents, C = D * G, and the domain (C,) it is of."""
    num_layers, num_domains, num_groups, num_experts = counts.choice_LDGE.shape
    choice_CLE = counts.choice_LDGE.transpose(1, 2, 0, 3).reshape(-1, num_layers, num_experts)
    return choice_CLE, np.repeat(np.arange(num_domains), num_groups)


def of_domain(counts: RoutingCounts, domain: int) -> RoutingCounts:
    """The counts of one domain alone, as the only one; order of choice and weights are left out."""
    num_domains = len(counts.token_DG)
    if not 0 <= domain < num_domains:
        raise ValueError(f"domain: got {domain}; it must be 0 to {num_domains - 1}.")
    only = slice(domain, domain + 1)
    return RoutingCounts(
        choice_LDGE=counts.choice_LDGE[:, only],
        token_DG=counts.token_DG[only],
        choice_LKE=np.zeros_like(counts.choice_LKE),
        weight_LE=np.zeros_like(counts.weight_LE),
        num_choices=counts.num_choices,
    )


def domain_share(
    counts: RoutingCounts, *, num_samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """(D, L, E): of a domain's tokens, the part that chose each expert (OLMoE's specialisation).

    Documents are drawn again within the domain, so domains compare by whether intervals meet. NaN
    for a domain without tokens.
    """
    parts = []
    num_layers, num_domains, _, num_experts = counts.choice_LDGE.shape
    for domain in range(num_domains):
        if counts.token_D[domain] == 0:
            nothing = np.full((num_layers, num_experts), np.nan)
            parts.append(Interval(nothing, nothing, nothing, level, 0))
            continue
        choice_CLE, _ = clusters_of(of_domain(counts, domain))
        parts.append(
            bootstrap(
                [choice_CLE, counts.token_DG[domain]],
                lambda choice, token: choice / token[:, None, None],
                num_samples=num_samples,
                level=level,
                seed=seed,
            )
        )
    return Interval(
        np.stack([part.estimate for part in parts]),
        np.stack([part.low for part in parts]),
        np.stack([part.high for part in parts]),
        level,
        min(part.num_clusters for part in parts),
    )


def domain_lift(
    counts: RoutingCounts, *, num_samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """(L, D, E): analysis.specialisation.lift of each domain, with intervals over all documents.

    An expert is chosen more (less) in a domain than over all tokens where the interval lies above
    (below) 1. NaN for a domain without tokens and for dead experts.
    """
    choice_CLE, stratum_C = clusters_of(counts)
    parts = [
        bootstrap(
            [choice_CLE * (stratum_C == domain)[:, None, None], choice_CLE],
            _lift,
            stratum_C=stratum_C,
            num_samples=num_samples,
            level=level,
            seed=seed,
        )
        for domain in range(len(counts.token_DG))
    ]
    return Interval(
        np.stack([part.estimate for part in parts], axis=1),
        np.stack([part.low for part in parts], axis=1),
        np.stack([part.high for part in parts], axis=1),
        level,
        min(part.num_clusters for part in parts),
    )


def _lift(of_domain: Floats, of_all: Floats) -> Floats:
    share, expected = load_ratio(of_domain), load_ratio(of_all)
    return np.divide(share, expected, out=np.full_like(share, np.nan), where=expected > 0)


def _root_of_lack(choice: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.maximum(-np.log(diversity(choice)), 0.0))
