"""Figures that set runs beside each other: how their loss fell, and where it ended.

Functions take analysis.learning_curves and return a matplotlib Figure, as figure_maps do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.figure_curves import LINES
from analysis.figure_frame import panels_of, styled, write_titles
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
    """The last validation loss of every run by arm, over all text and by domain, a dot a seed."""
    arms = _checked(curves)
    common = [set(curve.loss_by_domain) for curve in curves]
    domains = sorted(set.intersection(*common))[: _MOST_PANELS - 1]
    with styled():
        figure, panels = panels_of(
            1 + len(domains), width=2.6, height=0.9 + 0.3 * len(arms), columns=4
        )
        names = list(arms)
        # one width for all panels, and not so narrow that nothing looks like much
        spread = [np.ptp([_loss(curve, domain) for curve in curves]) for domain in (None, *domains)]
        span = max(1.25 * float(max(spread)), _LEAST_SPAN)
        for axes, domain in zip(panels, [None, *domains], strict=True):
            for row, (of_arm, (colour, marker)) in enumerate(
                zip(arms.values(), LINES, strict=False)
            ):
                loss = [_loss(curve, domain) for curve in of_arm]
                axes.plot(loss, [row] * len(loss), marker, color=colour, ms=5, alpha=0.75, mew=0)
                if len(loss) > 1:
                    axes.plot([np.mean(loss)] * 2, [row - 0.3, row + 0.3], color=colour, lw=2)
            axes.set_ylim(len(arms) - 0.5, -0.5)
            is_first = axes.get_subplotspec().is_first_col()
            axes.set_yticks(range(len(names)), names if is_first else [])
            axes.tick_params(axis="y", length=0)
            axes.set_title(domain or "all validation text", fontsize=10)
            every = [_loss(curve, domain) for curve in curves]
            middle = (min(every) + max(every)) / 2
            axes.set_xlim(middle - 0.5 * span, middle + 0.5 * span)
            axes.grid(visible=True, axis="x")
            axes.set_xlabel("nats per token")
            axes.locator_params(axis="x", nbins=4)
        write_titles(
            figure, title, "a dot a run, the line their mean; axes are as wide, from other starts"
        )
        return figure


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
