"""Figures that set runs beside each other: how their loss fell, and where it ended.

Functions take analysis.learning_curves and return a matplotlib Figure, as figure_maps do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.compare_runs import LEVEL, mean_over_seeds
from analysis.figure_curves import LINES
from analysis.figure_frame import GREY, panels_of, styled, write_titles
from analysis.learning_curves import LearningCurve, by_arm

_MOST_PANELS = 6
_LEAST_SPAN = 0.1  # nats: seeds of small models differ by about a tenth of it


def learning_figure(
    curves: Sequence[LearningCurve], *, title: str = "Validation loss as training goes on"
) -> Any:
    """Loss against tokens and against FLOPs: a thin line a run, a thick one the mean of seeds."""
    arms = _checked(curves)
    with styled():
        figure, panels = panels_of(2, width=4.5, height=3.3)
        for axes, name, label in zip(
            panels, ("tokens_P", "flops_P"), ("tokens", "training FLOPs"), strict=True
        ):
            for (arm, of_arm), (colour, marker) in zip(arms.items(), LINES, strict=False):
                _draw_arm(axes, of_arm, name, colour=colour, marker=marker, label=arm)
            axes.set_xlabel(label)
            axes.xaxis.set_major_formatter(_short)
            axes.grid(visible=True, axis="y")
        panels[0].set_ylabel("nats per token")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center",
            ncols=min(len(arms), 3), fontsize=8.5,
        )  # fmt: skip
        most = max(len(of_arm) for of_arm in arms.values())
        below = "thick: mean of the seeds; thin: each seed" if most > 1 else "one run of each"
        write_titles(figure, title, below)
        return figure


def final_figure(curves: Sequence[LearningCurve], *, title: str = "Loss at the end") -> Any:
    """The last validation loss of every run by arm, over all text and by domain, a dot a run.

    With the t-interval of an arm's mean over seeds (analysis.compare_runs) below its dots.
    """
    arms = _checked(curves)
    common = [set(curve.loss_by_domain) for curve in curves]
    domains = [None, *sorted(set.intersection(*common))[: _MOST_PANELS - 1]]
    with styled():
        figure, panels = panels_of(
            len(domains), width=2.6, height=0.9 + 0.36 * len(arms), columns=4
        )
        ends = []
        for axes, domain in zip(panels, domains, strict=True):
            for row, (of_arm, style) in enumerate(zip(arms.values(), LINES, strict=False)):
                loss = [_loss(curve, domain) for curve in of_arm]
                ends.append((axes, *_draw_dots(axes, loss, row, style)))
            is_first = axes.get_subplotspec().is_first_col()
            _name_rows(axes, list(arms), is_shown=is_first)
            axes.set_title(domain or "all validation text", fontsize=10)
            axes.set_xlabel("nats per token")
            axes.locator_params(axis="x", nbins=4)
        _set_equal_widths(panels, ends)
        below = f"a dot a run{_bar_of(curves)}; all panels are equally wide"
        write_titles(figure, title, below)
        return figure


def difference_figure(curves: Sequence[LearningCurve]) -> Any:
    """Each arm's last loss less that of the first arm, seed by seed, with t-intervals.

    Raises ValueError for fewer than two arms, and where an arm has no seed of the first's.
    """
    (first, of_first), *others = _checked(curves).items()
    if not others:
        raise ValueError("curves: got one arm; a difference needs two.")
    base = {curve.seed: curve.last_loss for curve in of_first}
    with styled():
        figure, (axes,) = panels_of(1, width=6.8, height=1.0 + 0.36 * len(others))
        ends = [0.0]
        for row, ((arm, of_arm), style) in enumerate(zip(others, LINES[1:], strict=False)):
            less = [curve.last_loss - base[curve.seed] for curve in of_arm if curve.seed in base]
            if not less:
                raise ValueError(f"curves: {arm} has no seed of {first} to pair with.")
            ends += _draw_dots(axes, less, row, style)
        axes.axvline(0, color=GREY, lw=1.2, ls=(0, (5, 3)))
        _name_rows(axes, [arm for arm, _ in others], is_shown=True)
        room = 0.08 * max(max(ends) - min(ends), 1e-6)
        axes.set_xlim(min(ends) - room, max(ends) + room)
        axes.set_xlabel("nats per token; right of 0: a higher loss")
        below = f"a dot a pair of runs of one seed{_bar_of(curves)}"
        write_titles(figure, f"Loss at the end, less that of {first}", below)
        return figure


def end_figures(curves: Sequence[LearningCurve]) -> list[Any]:
    """final_figure, and difference_figure where every arm has more than one seed."""
    has_seeds = all(len(of_arm) > 1 for of_arm in by_arm(curves).values())
    return [final_figure(curves), *([difference_figure(curves)] if has_seeds else [])]


def _draw_dots(
    axes: Any, values: list[float], row: int, style: tuple[str, str]
) -> tuple[float, float]:
    # the interval below the dots, which would hide it; returns how far both reach
    colour, marker = style
    axes.plot(values, [row] * len(values), marker, color=colour, ms=5, alpha=0.75, mew=0)
    if len(values) < 2:
        return min(values), max(values)
    mean = mean_over_seeds(values)
    below = row + 0.26
    axes.plot([mean.low, mean.high], [below, below], color=colour, lw=1.3)
    axes.plot([mean.low, mean.mean, mean.high], [below] * 3, "|", color=colour, ms=6, mew=1.3)
    return min(mean.low, *values), max(mean.high, *values)


def _set_equal_widths(panels: list[Any], ends: list[tuple[Any, float, float]]) -> None:
    # and not so narrow that a difference of nothing looks like much
    reach = []
    for axes in panels:
        of_panel = [(low, high) for other, low, high in ends if other is axes]
        reach.append((min(low for low, _ in of_panel), max(high for _, high in of_panel)))
    width = max(1.15 * max(high - low for low, high in reach), _LEAST_SPAN)
    for axes, (low, high) in zip(panels, reach, strict=True):
        middle = (low + high) / 2
        axes.set_xlim(middle - width / 2, middle + width / 2)


def _name_rows(axes: Any, names: list[str], *, is_shown: bool) -> None:
    axes.set_ylim(len(names) - 0.4, -0.5)
    axes.set_yticks(range(len(names)), names if is_shown else [])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")


def _bar_of(curves: Sequence[LearningCurve]) -> str:
    has_bars = any(len(of_arm) > 1 for of_arm in by_arm(curves).values())
    return f"; bar: {LEVEL:.0%} t-interval of the mean over seeds" if has_bars else ""


def _draw_arm(
    axes: Any, of_arm: list[LearningCurve], name: str, *, colour: str, marker: str, label: str
) -> None:
    lengths = {len(curve.loss_P) for curve in of_arm}
    is_mean = len(of_arm) > 1 and len(lengths) == 1
    if is_mean:
        for curve in of_arm:
            axes.plot(getattr(curve, name), curve.loss_P, color=colour, lw=0.8, alpha=0.45)
    shown = [(getattr(curve, name), curve.loss_P) for curve in of_arm]
    if is_mean:
        shown = [tuple(np.mean(values, axis=0) for values in zip(*shown, strict=True))]
    for at, loss in shown:
        axes.plot(
            at, loss, color=colour, marker=marker, lw=1.8, ms=4.5, mec="white", mew=0.5, label=label
        )
        label = "_"  # once in the legend


def _checked(curves: Sequence[LearningCurve]) -> dict[str, list[LearningCurve]]:
    arms = by_arm(curves)
    if not 1 <= len(arms) <= len(LINES):
        raise ValueError(f"curves: got {len(arms)} arms; it must be 1 to {len(LINES)}.")
    return arms


def _loss(curve: LearningCurve, domain: str | None) -> float:
    return curve.last_loss if domain is None else curve.loss_by_domain[domain]


def _short(value: float, _: object = None) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e9:
            return f"{value / size:g}{letter}"
    return f"{value:.2g}".replace("e+", "e")
