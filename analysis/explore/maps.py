"""Layers x experts: which quantities a run or trace has for the map, and their values at a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.explore.index import TraceIndex
from analysis.explore.leads import LeadCounts, lead_unit
from analysis.explore.run_log import RunLog
from analysis.utilisation import load_ratio

Floats = NDArray[np.float64]

LOG, STEPS, TRACE = "training log", "trace, step by step", "trace, all tokens"
LOAD, WEIGHT, LEAD = "load", "mean weight", "lead of the first choice"
_WITHIN = "load within "
_FACTORS = (1.25, 1.5, 2.0, 4.0)  # as in analysis.figure_maps: ends of the colour scale


@dataclass(frozen=True, eq=False)
class Side:
    """One run or trace of the page: what it is called, and what there is of it."""

    title: str
    facts: tuple[tuple[str, str], ...]  # name, what it is: a line each
    log: RunLog | None = None
    index: TraceIndex | None = None


@dataclass(frozen=True)
class MapScale:
    """How values become colours: by factors about 1 (is_ratio), or from low to high."""

    is_ratio: bool
    low: float
    high: float
    unit: str


def sources_of(side: Side) -> list[str]:
    """Where maps can come from, the one with the most to see first."""
    found = []
    if side.log is not None and side.log.has_routing:
        found.append(LOG)
    if side.index is not None:
        found += [STEPS, TRACE] if side.index.steps else [TRACE]
    return found


def quantities_of(side: Side, source: str) -> list[str]:
    """What a source has a map of."""
    if source == LOG or side.index is None:
        return [LOAD]
    info = side.index.info
    names = [LOAD, *(_WITHIN + domain for domain in info.domains), WEIGHT]
    return [*names, LEAD] if source == TRACE and lead_unit(info.layout) else names


def steps_of(side: Side, source: str) -> tuple[int, ...]:
    """The steps of a source, ascending; empty where it is one map of everything."""
    if source == LOG and side.log is not None:
        return tuple(side.log.step_S.tolist())
    return side.index.steps if source == STEPS and side.index is not None else ()


def map_of(side: Side, source: str, *, quantity: str, step: int | None) -> Floats:
    """(L, E): the quantity at a step, the latest at or before it, of LOG and STEPS.

    Load: times the even share. Weight: mean over the expert's tokens. NaN where there is no token.
    """
    if source == LOG:
        assert side.log is not None
        return load_ratio(side.log.load_SLE[_place(steps_of(side, LOG), step)])
    assert side.index is not None
    if source == TRACE:
        return _of_trace(side.index, quantity)
    place = _place(side.index.steps, step)
    load_LDE = side.index.of_layer("steps/load_SLDE", place)
    if quantity == WEIGHT:
        return _over(side.index.of_layer("steps/weight_SLE", place), load_LDE.sum(axis=1))
    return _ratio(load_LDE, side.index.info.domains, quantity)


def scale_of(sides: Sequence[Side], source: str, *, quantity: str) -> MapScale:
    """One scale for all sides and steps, so that colours mean the same everywhere."""
    seen = [
        map_of(side, source, quantity=quantity, step=step)
        for side in sides
        if source in sources_of(side) and quantity in quantities_of(side, source)
        for step in _some(steps_of(side, source)) or [None]
    ]
    values = np.concatenate([value.ravel() for value in seen]) if seen else np.zeros(0)
    values = values[np.isfinite(values) & (values > 0)]
    if quantity in (WEIGHT, LEAD):
        low, high = (0.0, float(values.max(initial=1e-3)))
        return MapScale(False, low, high, _unit(sides, quantity))
    far = float(np.quantile(np.exp2(np.abs(np.log2(values))), 0.9)) if len(values) else 1.0
    factor = next((factor for factor in _FACTORS if far <= factor), _FACTORS[-1])
    return MapScale(True, 1 / factor, factor, "times the even share")


def _of_trace(index: TraceIndex, quantity: str) -> Floats:
    counts = index.routing
    if quantity == WEIGHT:
        return _over(counts.weight_LE, counts.load_LE)
    if quantity == LEAD:
        return LeadCounts(index.array("lead_LE"), index.array("lead_token_LE")).mean_LE
    return _ratio(counts.load_LDE, index.info.domains, quantity)


def _ratio(load_LDE: NDArray, domains: Sequence[str], quantity: str) -> Floats:
    if quantity == LOAD:
        return load_ratio(load_LDE.sum(axis=1))
    return load_ratio(load_LDE[:, list(domains).index(quantity.removeprefix(_WITHIN))])


def _over(total: NDArray, number: NDArray) -> Floats:
    nothing = np.full(total.shape, np.nan)
    return np.divide(total, number, out=nothing, where=number > 0)


def _unit(sides: Sequence[Side], quantity: str) -> str:
    if quantity == WEIGHT:
        return "mean weight"
    units = [lead_unit(side.index.info.layout) for side in sides if side.index is not None]
    return next((unit for unit in units if unit), "")


def _place(steps: Sequence[int], step: int | None) -> int:
    """The latest step at or before it, the first where it is before all, the last for None."""
    if step is None:
        return len(steps) - 1
    return max(0, int(np.searchsorted(steps, step, side="right")) - 1)


def _some(steps: Sequence[int]) -> list[int]:
    """At most 40 of them, evenly: enough to set a colour scale by."""
    return (
        [
            steps[int(n)]
            for n in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 40)).round())
        ]
        if steps
        else []
    )
