"""The figures of a counted trace, each from the counts alone; analysis.figure_maps draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.balance import Balance, domain_lift
from analysis.bootstrap import Interval
from analysis.co_activation import normalised_co_activation
from analysis.count_trace import TraceCounts
from analysis.figure_curves import explained_curves, interval_points, margin_fan
from analysis.figure_maps import co_activation_map, domain_map, load_map
from analysis.key_counts import NUM_POSITION_BUCKETS, KeyCounts, first_position
from analysis.margins import MarginCounts, alone_fraction, mean_masked_fraction
from analysis.routing_counts import RoutingCounts
from analysis.specialisation import lift, share_explained
from moe.errors import DataError

_STAGES = ("first choice", "second choice")


def load_figure(balance: Balance) -> Any:
    """Load of every layer and expert; bold where the interval excludes an even share."""
    return load_map(balance.ratio.estimate, is_clear=_excludes_one(balance.ratio))


def imbalance_figure(balance: Balance) -> Any:
    """The three deviations of analysis.balance and the experts in use, by layer, with intervals."""
    named = {name.capitalize(): {"": interval} for name, interval in balance.deviation.items()}
    level = f"{balance.diversity.level:.0%}"
    return interval_points(
        named,
        title="How uneven the load is",
        below=f"0: every expert gets the same; bars: {level} intervals over documents",
    )


def domain_figure(counts: RoutingCounts, domains: Sequence[str]) -> Any:
    """Lift of every domain, with dots where its interval excludes 1.

    Raises DataError where fewer than two domains have tokens: there is nothing to compare.
    """
    has_tokens = counts.token_D > 0
    if has_tokens.sum() < 2:
        named = [name for name, has in zip(domains, has_tokens, strict=True) if has]
        raise DataError(
            f"domains: the trace has tokens of {', '.join(named) or 'none'} only, of the domains "
            f"{', '.join(domains)}; specialisation compares two or more. Trace text of others too: "
            "leave domains= out of the trace command."
        )
    interval = domain_lift(counts)
    return domain_map(interval.estimate, domains, is_clear=_excludes_one(interval))


def explained_figure(counts: TraceCounts, *, min_count: int = 20) -> Any:
    """What the token id, the position and the domain say about the first choice, by layer."""
    return explained_curves(explained_shares(counts, min_count=min_count))


def explained_shares(counts: TraceCounts, *, min_count: int = 20) -> dict[str, NDArray[np.float64]]:
    """Name of a key -> (L,) analysis.specialisation.share_explained of it.

    Ids and positions of fewer than min_count tokens are left out. All K choices count for the
    domain, and the first for the others.
    """
    shares = {
        "position": share_explained(counts.positions.choice_LXE, min_count=min_count),
        "domain": share_explained(counts.routing.load_LDE),
    }
    if counts.tokens is not None:
        token = share_explained(counts.tokens.choice_LXE, min_count=min_count)
        shares = {"token id": token, **shares}
    return shares


def pairs_figure(counts: TraceCounts) -> Any:
    """Experts chosen together, over chance; DataError where a token chooses only one."""
    if counts.pairs.top_k < 2:
        raise DataError(
            "co-activation: every token chooses one expert (model.top_k=1), so none are chosen "
            "together. Leave this figure out."
        )
    return co_activation_map(normalised_co_activation(counts.pairs.pair_LEE))


def position_figure(positions: KeyCounts) -> Any:
    """First choices by the position in the document, in buckets of doubling width."""
    last = int(np.flatnonzero(positions.token_X)[-1])
    names = ["0"] + [
        f"{first_position(bucket)}–{first_position(bucket + 1) - 1}"  # noqa: RUF001 (a range of numbers)
        for bucket in range(1, last + 1)
    ]
    if last == NUM_POSITION_BUCKETS - 1:
        names[-1] = f"{first_position(last)} on"
    return domain_map(
        lift(positions.choice_LXE[:, : last + 1]), names, key="position",
        title="What the position changes",
    )  # fmt: skip


def margin_figures(counts: MarginCounts | None) -> list[Any]:
    """How close the next choice was, and for SparseMixer what its threshold masked.

    Raises DataError for a trace without logits.
    """
    if counts is None:
        raise DataError(
            "margins: the trace has no router logits, or its tokens choose every expert. Trace "
            "with logits=true to see how close the next choice was."
        )
    figures = [margin_fan(counts.histogram_LKH)]
    if counts.threshold is not None:
        masked, alone = mean_masked_fraction(counts), alone_fraction(counts)
        panels = {
            "Experts masked, of those left to choose": _by_stage(masked),
            "Tokens with one expert left": _by_stage(alone),
        }
        below = (
            f"threshold {counts.threshold:g}: an expert further than {2 * counts.threshold:.0%} "
            f"below the best; bars: {masked.level:.0%} intervals"
        )
        shares = dict.fromkeys(panels, "share")
        figures.append(
            interval_points(panels, title="What SparseMixer masks", below=below, labels=shares)
        )
    return figures


def _by_stage(interval: Interval) -> dict[str, Interval]:
    def of(stage: int) -> Interval:
        estimate, low, high = (
            bound[..., stage] for bound in (interval.estimate, interval.low, interval.high)
        )
        return Interval(estimate, low, high, interval.level, interval.num_clusters)

    return {name: of(stage) for stage, name in enumerate(_STAGES)}


def _excludes_one(interval: Interval) -> NDArray[np.bool_]:
    return (interval.low > 1) | (interval.high < 1)
