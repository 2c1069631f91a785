"""The figure of a comparison: learning curves above, losses and paired differences below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.compare_runs import Difference, Mean, Row, by_seed, curve, difference, mean_over_seeds
from analysis.comparison_report import label
from analysis.figure_frame import GREY, INK, name_axes, styled, write_titles
from moe.compare_config import CompareConfig

# Okabe and Ito's palette without its yellow, which is too pale for a line on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B7280")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_CURVES_HEIGHT = 3.7  # inches
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def comparison_figure(config: CompareConfig, rows: Sequence[Row], curves: Sequence[Row]) -> Any:
    """A matplotlib Figure; dots are seeds, bars are 95 % t-intervals, bands the range of seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    below = 1.1 + 0.38 * max(len(config.arms), len(config.contrasts))
    height = _CURVES_HEIGHT + below + 0.6
    with styled():
        engine = ConstrainedLayoutEngine(rect=(0.005, 0.005, 0.99, 1 - 0.62 / height))
        figure = Figure(figsize=(12.5, height), dpi=130, layout=engine)
        FigureCanvasAgg(figure)
        # two grids that do not share margins: the names below are long, those above are short
        halves: Any = figure.subfigures(2, 1, height_ratios=[_CURVES_HEIGHT, below])
        upper, lower = halves
        panels = upper.subplots(1, 2)
        _draw_curves(panels[0], config, curves, "total_tokens")
        if _cost_alike(curves):  # then against FLOPs is the same picture
            _draw_distances(panels[1], config, curves)
        else:
            _draw_curves(panels[1], config, curves, "total_flops")
        lines, names = panels[0].get_legend_handles_labels()
        upper.legend(lines, names, loc="outside right upper", handlelength=2.6, fontsize=8.5)
        left, right = lower.subplots(1, 2)
        _draw_losses(left, config, rows)
        _draw_differences(right, config, rows)
        write_titles(
            figure, config.title,
            "validation loss, nats per token  ·  dots: one seed each  ·  bars: mean and 95 % "
            "interval (Student's t over seeds)  ·  bands: least to largest of the seeds",
        )  # fmt: skip
        figure.draw_without_rendering()  # with this style, also where it is shown later
    return figure


def arm_look(config: CompareConfig, name: str) -> dict[str, Any]:
    """An arm's colour, dashes and marker: no two arms differ by colour alone."""
    number = [arm.name for arm in config.arms].index(name)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "ls": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def _draw_curves(axes: Any, config: CompareConfig, curves: Sequence[Row], x: str) -> None:
    for arm in config.arms:
        xs, mean, least, most = curve(curves, arm.name, x)
        look = arm_look(config, arm.name)
        axes.fill_between(xs, least, most, color=look["color"], alpha=0.15, lw=0)
        axes.plot(
            xs, mean, lw=1.6, ms=4.5, mec="white", mew=0.5, label=label(config, arm.name), **look
        )
    is_tokens = x == "total_tokens"
    unit, name = (
        (1e6, "million tokens") if is_tokens else (1e12, "10¹² FLOPs, forward and backward")
    )
    axes.set_title("Against tokens" if is_tokens else "Against FLOPs")
    name_axes(axes, name, "validation loss" if is_tokens else "")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:.3g}")
    axes.set_xlim(left=0)
    axes.grid(visible=True, axis="y")


def _cost_alike(curves: Sequence[Row]) -> bool:
    """Whether a token costs every arm the same, within 2 %."""
    costs = [float(row["total_flops"]) / float(row["total_tokens"]) for row in curves]
    return max(costs) < 1.02 * min(costs)


def _draw_distances(axes: Any, config: CompareConfig, curves: Sequence[Row]) -> None:
    first = config.arms[0].name
    base = {
        (r["seed"], r["step"]): float(r["validation_loss"]) for r in curves if r["arm"] == first
    }
    for arm in config.arms:
        at: dict[float, list[float]] = {}
        for row in curves:
            place = row["seed"], row["step"]
            if row["arm"] == arm.name and place in base:
                distance = float(row["validation_loss"]) - base[place]
                at.setdefault(float(row["total_tokens"]), []).append(distance)
        xs, look = sorted(at), arm_look(config, arm.name)
        least, most = [min(at[x]) for x in xs], [max(at[x]) for x in xs]
        axes.fill_between(xs, least, most, color=look["color"], alpha=0.15, lw=0)
        mean = [sum(at[x]) / len(at[x]) for x in xs]
        axes.plot(xs, mean, lw=1.6, ms=4.5, mec="white", mew=0.5, **look)
    axes.set_title(f"Less the loss of {label(config, first)}, seed by seed")
    name_axes(axes, "million tokens", "difference")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.3g}")
    axes.set_xlim(left=0)
    axes.grid(visible=True, axis="y")


def _draw_losses(axes: Any, config: CompareConfig, rows: Sequence[Row]) -> None:
    for place, arm in enumerate(config.arms):
        values = list(by_seed(rows, arm.name, "validation_loss").values())
        if values:
            _draw_mean(axes, place, values, mean_over_seeds(values), arm_look(config, arm.name))
    axes.set_yticks(range(len(config.arms)), [label(config, arm.name) for arm in config.arms])
    axes.set_title("At the end of each run")
    _finish(axes, len(config.arms), "validation loss")


def _draw_differences(axes: Any, config: CompareConfig, rows: Sequence[Row]) -> None:
    found = [difference(rows, c.arm, against=c.against) for c in config.contrasts]
    axes.axvline(0, color=INK, lw=1.0)
    for place, (contrast, pair) in enumerate(zip(config.contrasts, found, strict=True)):
        look = arm_look(config, contrast.arm)
        if not pair.mean.excludes_zero:
            look = look | {"color": GREY}
        _draw_mean(axes, place, list(pair.by_seed.values()), pair.mean, look)
    axes.set_yticks(range(len(found)), [_pair_name(config, pair) for pair in found])
    axes.set_title("Differences within a seed")
    _finish(axes, len(found), "below 0 the first is better; grey: the interval holds 0")


def _pair_name(config: CompareConfig, pair: Difference) -> str:
    return f"{label(config, pair.arm)}\nagainst {label(config, pair.against)}"


def _draw_mean(
    axes: Any, place: int, values: Sequence[float], mean: Mean, look: dict[str, Any]
) -> None:
    colour = look["color"]
    if mean.num_seeds > 1:
        axes.plot([mean.low, mean.high], [place, place], color=colour, lw=6, alpha=0.25)
    axes.plot([mean.mean] * 2, [place - 0.22, place + 0.22], color=colour, lw=2.2)
    axes.plot(values, [place] * len(values), "o", color=colour, ms=5, mec="white", mew=0.7)


def _finish(axes: Any, number: int, x: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(number - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_visible(False)
    name_axes(axes, x, "")
