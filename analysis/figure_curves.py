"""Curves of a trace: since when routing is settled, how sure it is, and what decides it.

Functions take arrays of the analysis and return a matplotlib Figure, as analysis.figure_maps do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.bootstrap import Interval
from analysis.figure_frame import GREY, colour_bar, panels_of, styled, ticks_of, write_titles
from analysis.margins import quantile_of_margins

# Okabe and Ito, with a marker of its own for each: read in grey too
LINES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
    ("#1F2937", "X"),
)


def saturation_curves(
    steps: Sequence[float],
    saturation: Sequence[Interval],
    *,
    chance: ArrayLike | None = None,
    title: str = "Router saturation",
) -> Any:
    """An Interval (L,) for each step (analysis.overlap) -> a line and band for each layer.

    chance: (L,) chance_saturation of the steps' last pair; its mean is drawn dashed.
    """
    if len(steps) != len(saturation) or not len(steps):
        raise ValueError(f"steps: got {len(steps)} for {len(saturation)} intervals; one for each.")
    at = np.asarray(steps, dtype=np.float64)
    value_SL = np.stack([np.atleast_1d(interval.estimate) for interval in saturation])
    low_SL = np.stack([np.atleast_1d(interval.low) for interval in saturation])
    high_SL = np.stack([np.atleast_1d(interval.high) for interval in saturation])
    num_layers = value_SL.shape[1]
    with styled():
        figure, (axes,) = panels_of(1, width=7.4, height=3.7)
        for layer in range(num_layers):
            colour = layer_colour(layer, num_layers)
            axes.fill_between(
                at, low_SL[:, layer], high_SL[:, layer], color=colour, alpha=0.16, lw=0
            )
            axes.plot(
                at, value_SL[:, layer], "o-", color=colour, lw=1.6, ms=3.5, mec="white", mew=0.5
            )
        if chance is not None:
            level = float(np.nanmean(np.asarray(chance, dtype=np.float64)))
            axes.axhline(level, color=GREY, lw=1.2, ls=(0, (5, 3)))
            axes.annotate(
                "chance",
                (1, level),
                (-2, 4),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                color=GREY,
            )
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("share of experts already chosen")
        axes.set_xlabel("step")
        axes.grid(visible=True, axis="y")
        level = f"{saturation[0].level:.0%}"
        write_titles(
            figure,
            title,
            f"share of a token's last experts that it chose already; band: {level} interval",
        )
        layer_bar(figure, [axes], num_layers)
        return figure


def margin_fan(histogram: ArrayLike, *, title: str = "How close the next choice was") -> Any:
    """(L, K, H) of analysis.margins -> by layer the median, and where half and nine tenths are."""
    histogram_LKH = np.asarray(histogram)
    num_layers, top_k, _ = histogram_LKH.shape
    # one more at both ends: the outer layers then get their whole width
    layer_L = np.arange(-1, num_layers + 1)
    with styled():
        figure, panels = panels_of(top_k, width=4.3, height=2.9, columns=min(top_k, 2))
        top = 0.0
        for k, axes in enumerate(panels):
            quantile = {
                q: np.pad(quantile_of_margins(histogram_LKH[:, k], q), 1, mode="edge")
                for q in (0.05, 0.25, 0.5, 0.75, 0.95)
            }
            colour, _ = LINES[0]
            wide = axes.fill_between(
                layer_L, quantile[0.05], quantile[0.95], color=colour, alpha=0.15, lw=0, step="mid"
            )
            half = axes.fill_between(
                layer_L, quantile[0.25], quantile[0.75], color=colour, alpha=0.3, lw=0, step="mid"
            )
            (middle,) = axes.plot(layer_L, quantile[0.5], color=colour, lw=2, drawstyle="steps-mid")
            next_ = (
                f"choice {k + 1} over choice {k + 2}"
                if k + 1 < top_k
                else (f"choice {k + 1} over the first left out")
            )
            axes.set_title(next_, fontsize=9.5)
            axes.set_xlabel("layer")
            axes.set_xlim(-0.5, num_layers - 0.5)
            axes.set_xticks(ticks_of(num_layers))
            axes.grid(visible=True, axis="y")
            top = max(top, float(np.nan_to_num(quantile[0.95]).max()))
            if k == 0:
                axes.set_ylabel("margin of logits (nats)")
                axes.legend(
                    [middle, half, wide],
                    ["median", "half of the tokens", "nine tenths"],
                    loc="upper left",
                    fontsize=8.5,
                    ncols=3,
                    handlelength=1.2,
                    columnspacing=1.0,
                )
        for axes in panels:
            axes.set_ylim(0, 1.25 * top if top > 0 else 1.0)
        write_titles(figure, title, "0: a tie; 0.7: odds of two to one; 2.3: of ten to one")
        return figure


def explained_curves(
    explained: Mapping[str, ArrayLike], *, title: str = "What decides the first choice"
) -> Any:
    """Name of a key -> (L,) share_explained (analysis.specialisation); a line each, to seven."""
    if not 1 <= len(explained) <= len(LINES):
        raise ValueError(f"explained: got {len(explained)} curves; it must be 1 to {len(LINES)}.")
    with styled():
        figure, (axes,) = panels_of(1, width=6.6, height=3.3)
        top = 0.0
        for (name, value), (colour, marker) in zip(explained.items(), LINES, strict=False):
            value_L = np.asarray(value, dtype=np.float64)
            axes.plot(
                range(len(value_L)),
                value_L,
                color=colour,
                marker=marker,
                lw=1.8,
                ms=5.5,
                mec="white",
                label=name,
                clip_on=False,
            )
            top = max(top, float(np.nan_to_num(value_L).max()))
            axes.set_xticks(ticks_of(len(value_L)))
        axes.set_ylim(0, 1.15 * top if top > 0 else 1.0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.3g}")
        axes.set_xlabel("layer")
        axes.set_ylabel("share of uncertainty explained")
        axes.grid(visible=True, axis="y")
        axes.legend(
            ncols=len(explained), fontsize=8.5, loc="lower right", bbox_to_anchor=(1.01, 0.98)
        )
        write_titles(figure, title, "mutual information over the entropy of the choice")
        return figure


def interval_points(
    panels: Mapping[str, Mapping[str, Interval]],
    *,
    title: str,
    below: str,
    labels: Mapping[str, str] | None = None,
) -> Any:
    """Panel title -> name of a series -> Interval (L,): a point and its interval for each layer.

    Up to seven series a panel, from 0 upwards; labels names the vertical axis of a panel.
    """
    if not panels or not all(1 <= len(series) <= len(LINES) for series in panels.values()):
        raise ValueError(f"panels: each needs 1 to {len(LINES)} series, and there must be one.")
    with styled():
        width = 3.2 if len(panels) > 2 else 4.3
        figure, all_axes = panels_of(len(panels), width=width, height=2.5, columns=3)
        for axes, (name, series) in zip(all_axes, panels.items(), strict=True):
            axes.set_title(name, fontsize=10)
            top = _draw_points(axes, series)
            axes.set_ylim(0, 1.12 * top if top > 0 else 1.0)
            axes.set_xlabel("layer")
            axes.set_ylabel((labels or {}).get(name, ""))
            axes.grid(visible=True, axis="y")
        if max(map(len, panels.values())) > 1:
            handles, names = all_axes[0].get_legend_handles_labels()
            figure.legend(
                handles, names, loc="outside lower center", ncols=len(names), fontsize=8.5
            )
        write_titles(figure, title, below)
        return figure


def _draw_points(axes: Any, series: Mapping[str, Interval]) -> float:
    # beside each other within a layer, so that no interval hides another
    top = 0.0
    for number, (name, interval) in enumerate(series.items()):
        colour, marker = LINES[number]
        value_L = np.atleast_1d(interval.estimate)
        low_L, high_L = np.atleast_1d(interval.low), np.atleast_1d(interval.high)
        at_L = np.arange(len(value_L)) + 0.16 * (number - (len(series) - 1) / 2)
        axes.vlines(at_L, low_L, high_L, color=colour, lw=1.4)
        for end_L in (low_L, high_L):
            axes.plot(at_L, end_L, "_", color=colour, ms=7, mew=1.4)
        axes.plot(at_L, value_L, marker, color=colour, ms=4.5, mec="white", mew=0.6, label=name)
        top = max(top, float(np.nan_to_num(np.stack([value_L, high_L])).max()))
        axes.set_xticks(ticks_of(len(value_L)))
        axes.set_xlim(-0.6, len(value_L) - 0.4)
    return top


def layer_bar(figure: Any, panels: list[Any], num_layers: int) -> None:
    """A colour bar that says which colour is which layer's."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap([layer_colour(layer, num_layers) for layer in range(num_layers)])
    scale = BoundaryNorm(np.arange(num_layers + 1) - 0.5, num_layers)
    bar = colour_bar(figure, ScalarMappable(scale, colours), panels, "layer")
    bar.set_ticks(ticks_of(num_layers))
    bar.ax.minorticks_off()


def layer_colour(layer: int, num_layers: int) -> Any:
    """The colour of a layer's curve: from dark, the first, to bright, the last."""
    from matplotlib import colormaps

    # the brightest tenth of viridis is too pale for a line on white
    return colormaps["viridis"](0.88 * layer / max(num_layers - 1, 1))
