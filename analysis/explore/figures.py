"""The map and the curves of the page as plotly figures, in plain dicts.

Text is of one grey that can be read on white and on black: the page follows the reader's theme,
and a figure is not told which it is.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.explore.curves import Curve
from analysis.explore.maps import MapScale

INK = "#7A828E"
EMPTY = "#A3A9B5"  # as analysis.figure_frame
FAINT = "rgba(128, 136, 148, 0.28)"
# Okabe and Ito's palette, and ColorBrewer's PuOr and matplotlib's viridis, as analysis.figure_maps
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ORANGE_HIGH = (
    "#2D004B", "#542788", "#8073AC", "#B2ABD2", "#D8DAEB", "#F7F7F7", "#FEE0B6", "#FDB863",
    "#E08214", "#B35806", "#7F3B08",
)  # fmt: skip
VIRIDIS = ("#440154", "#414487", "#2A788E", "#22A884", "#7AD151", "#FDE725")
_NUMBERS_UP_TO = 160  # cells of a map that still hold their number
_UNDER = {1.25: "4/5", 1.5: "2/3", 2.0: "1/2", 4.0: "1/4"}


def map_figure(
    values_LE: NDArray[np.floating], scale: MapScale, *, title: str, chosen: tuple[int, int] | None
) -> dict[str, Any]:
    """(L, E) -> a heat map; a cross for an expert without tokens, a frame around the chosen one."""
    num_layers, num_experts = values_LE.shape
    is_dead = ~np.isfinite(values_LE) | (scale.is_ratio & (values_LE == 0))
    shown = np.where(is_dead, np.nan, values_LE)
    if scale.is_ratio:
        shown = np.clip(np.log2(shown), np.log2(scale.low), np.log2(scale.high))
    words = [["\u00d7" if dead else f"{value:.2f}" for value, dead in zip(*row, strict=True)]
             for row in zip(values_LE, is_dead, strict=True)]  # fmt: skip
    rows_high = max(18, min(44, 560 // num_layers)) * num_layers
    heat: dict[str, Any] = {
        "type": "heatmap",
        "z": _plain(shown),
        "x": list(range(num_experts)),
        "y": list(range(num_layers)),
        "text": words,
        "customdata": _plain(values_LE),
        "hovertemplate": f"layer %{{y}}, expert %{{x}}<br>%{{text}} {scale.unit}<extra></extra>",
        "xgap": 1.5, "ygap": 1.5,
        "colorscale": _stops(ORANGE_HIGH if scale.is_ratio else VIRIDIS),
        "zmin": float(np.log2(scale.low)) if scale.is_ratio else scale.low,
        "zmax": float(np.log2(scale.high)) if scale.is_ratio else scale.high,
        "colorbar": _bar(scale, below=62 / rows_high),
        "hoverongaps": True,
    }  # fmt: skip
    if values_LE.size <= _NUMBERS_UP_TO:
        heat |= {"texttemplate": "%{text}", "textfont": {"size": 10.5}}
    layout = _layout(title, height=44 + rows_high + 124)
    layout["margin"]["b"] = 124
    layout["plot_bgcolor"] = EMPTY  # what a dead expert's cross is read on, in light and dark
    layout["xaxis"] |= {
        "title": {"text": "expert"},
        "dtick": _stride(num_experts),
        "showgrid": False,
    }
    layout["yaxis"] |= {
        "title": {"text": "layer"}, "dtick": _stride(num_layers), "autorange": "reversed",
        "showgrid": False,
    }  # fmt: skip
    if chosen is not None:
        layer, expert = chosen
        layout["shapes"] = [
            {"type": "rect", "x0": expert - 0.5, "x1": expert + 0.5, "y0": layer - 0.5,
             "y1": layer + 0.5, "line": {"color": COLOURS[2], "width": 3.5}}
        ]  # fmt: skip
    return {"data": [heat], "layout": layout}


def curve_figure(curve: Curve) -> dict[str, Any]:
    """Lines over steps, of a colour and a dash each."""
    dashes = ("solid", "dash", "dot", "dashdot")
    data = [
        {
            "type": "scatter", "x": _plain(line.step_N), "y": _plain(line.value_N),
            "name": escape(line.name),
            "mode": "lines" if len(line.step_N) > 30 else "lines+markers",
            "line": {"color": COLOURS[n % len(COLOURS)], "width": 2,
                     "dash": dashes[n % len(dashes)]},
            "hovertemplate": "step %{x:,}: %{y:.4g}<extra>%{fullData.name}</extra>",
        }
        for n, line in enumerate(curve.lines)
    ]  # fmt: skip
    layout = _layout(curve.title, height=250)
    layout["xaxis"] |= {"title": {"text": "step"}, "tickformat": ",d"}
    layout["yaxis"] |= {"title": {"text": curve.unit}, "rangemode": curve.range_mode}
    layout["showlegend"] = len(data) > 1
    layout["legend"] = {
        "orientation": "h",
        "y": 1.02,
        "yanchor": "bottom",
        "x": 1,
        "xanchor": "right",
    }
    return {"data": data, "layout": layout}


def _layout(title: str, *, height: int) -> dict[str, Any]:
    axis = {"gridcolor": FAINT, "zeroline": False, "linecolor": FAINT, "fixedrange": True}
    return {
        "title": {
            "text": escape(title),
            "font": {"size": 14},
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
        },
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 44, "b": 44},
        "font": {"color": INK, "size": 12, "family": "system-ui, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": dict(axis),
        "yaxis": dict(axis),
        "dragmode": False,
        "hovermode": "closest",
    }


def _bar(scale: MapScale, *, below: float) -> dict[str, Any]:
    """A colour bar below the map, by that part of the map's height."""
    bar: dict[str, Any] = {
        "title": {"text": scale.unit, "side": "top"}, "orientation": "h", "thickness": 10,
        "len": 0.6, "y": -below, "yanchor": "top", "x": 0.5, "xanchor": "center", "outlinewidth": 0,
    }  # fmt: skip
    if scale.is_ratio:
        factor = scale.high
        steps = [factor] if factor < 2 else [2.0**n for n in range(1, int(np.log2(factor)) + 1)]
        powers = [float(np.log2(s)) for s in steps]
        bar["tickvals"] = [-p for p in reversed(powers)] + [0.0, *powers]
        bar["ticktext"] = [_UNDER[s] for s in reversed(steps)] + ["1"] + [f"{s:g}" for s in steps]
    return bar


def _stops(colours: tuple[str, ...]) -> list[list[Any]]:
    return [[n / (len(colours) - 1), colour] for n, colour in enumerate(colours)]


def _stride(number: int) -> int:
    return next(s for s in (1, 2, 4, 8, 16, 32, number) if number / s <= 16)


def _plain(values: NDArray[Any]) -> list[Any]:
    """Lists of numbers; None for what JSON has no number for."""
    listed = np.asarray(values, np.float64).astype(object)
    listed[~np.isfinite(np.asarray(values, np.float64))] = None
    return listed.tolist()
