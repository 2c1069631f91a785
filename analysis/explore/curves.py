"""What of a run goes over steps: losses, evenness of load, dead experts, the router's entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.explore.maps import Side
from analysis.utilisation import coefficient_of_variation, dead_experts

Floats = NDArray[np.float64]
_MOST_POINTS = 2000  # of a line: more than a screen has columns


@dataclass(frozen=True, eq=False)
class Line:
    """A name and N points."""

    name: str
    step_N: NDArray
    value_N: Floats


@dataclass(frozen=True)
class Curve:
    """A panel."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    range_mode: str = "tozero"  # of plotly: an axis from zero, or "normal"


def curves_of(sides: Sequence[Side]) -> list[Curve]:
    """The panels for which any side's log has numbers; lines are named by side where there are two.

    Load deviation is the mean of the layers and the worst; entropy that of the highest and lowest.
    """
    panels = [
        Curve("Loss", "nats per token", (*_series(sides, "loss", "training"),
              *_series(sides, "validation/loss", "validation")), "normal"),
        Curve("Load deviation", "standard deviation / mean", (
            *_routed(sides, "mean of layers", lambda load: coefficient_of_variation(load).mean(-1)),
            *_routed(sides, "worst layer", lambda load: coefficient_of_variation(load).max(-1)))),
        Curve("Dead experts", "experts without a token in a step", _routed(
            sides, "all layers", lambda load: dead_experts(load).sum(axis=(-1, -2)))),
        Curve("Router entropy", "nats, mean over tokens", _entropy(sides), "normal"),
        Curve("Balance loss", "K, choices a token, at even load",
              _series(sides, "loss/balance", "balance"), "normal"),
    ]  # fmt: skip
    return [panel for panel in panels if panel.lines]


def _series(sides: Sequence[Side], name: str, shown: str) -> tuple[Line, ...]:
    return tuple(
        _line(_named(side, shown, sides), *side.log.series[name])
        for side in sides
        if side.log is not None and name in side.log.series
    )


def _routed(
    sides: Sequence[Side], shown: str, number: Callable[[NDArray], NDArray]
) -> tuple[Line, ...]:
    return tuple(
        _line(_named(side, shown, sides), side.log.step_S, number(side.log.load_SLE))
        for side in sides
        if side.log is not None and side.log.has_routing
    )


def _entropy(sides: Sequence[Side]) -> tuple[Line, ...]:
    lines = []
    for side in sides:
        if side.log is None or not np.isfinite(side.log.entropy_SL).any():
            continue
        for shown, value in (
            ("highest layer", side.log.entropy_SL.max(axis=1)),
            ("lowest layer", side.log.entropy_SL.min(axis=1)),
        ):
            lines.append(_line(_named(side, shown, sides), side.log.step_S, value))
    return tuple(lines)


def _named(side: Side, shown: str, sides: Sequence[Side]) -> str:
    return shown if len(sides) == 1 else f"{side.title}: {shown}"


def _line(name: str, step_N: NDArray, value_N: NDArray) -> Line:
    stride = -(-len(step_N) // _MOST_POINTS) if len(step_N) else 1
    return Line(name, step_N[::stride], np.asarray(value_N, np.float64)[::stride])
