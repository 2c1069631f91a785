"""What all figures share: style, panels, titles, and colour bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from analysis.plots import STYLE

INK, GREY = "#1F2937", "#6B7280"
EMPTY = "#A3A9B5"  # cells without a number: apart from the palest colours of every scale
_LEAST_WIDTH, _LEAST_HEIGHT = 5.2, 2.6  # inches: the line below the title, a colour bar's name


@contextmanager
def styled() -> Iterator[None]:
    """Figures built inside have the style of analysis.plots; the caller's is left alone."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield


def panels_of(
    number: int, *, width: float, height: float, columns: int = 4
) -> tuple[Any, list[Any]]:
    """A figure of its own, without pyplot, and its axes row by row; width and height of one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(columns, number)
    rows = -(-number // columns)
    size = (max(columns * width, _LEAST_WIDTH), max(rows * height + 0.6, _LEAST_HEIGHT))
    below_titles = (0.01, 0.03 / size[1], 0.98, 1 - 0.71 / size[1])
    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(rect=below_titles))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns)
    return figure, [figure.add_subplot(grid[n // columns, n % columns]) for n in range(number)]


def write_titles(figure: Any, title: str, below: str) -> None:
    """The title, and below it in grey what the numbers are."""
    height = figure.get_size_inches()[1]
    figure.text(0.015, 1 - 0.1 / height, title, va="top", fontsize=13, fontweight="bold")
    figure.text(0.015, 1 - 0.37 / height, below, va="top", fontsize=9, color=GREY)


def colour_bar(
    figure: Any, image: Any, panels: list[Any], label: str, *, extend: str = "neither"
) -> Any:
    """A colour bar beside the panels, named."""
    bar = figure.colorbar(
        image, ax=panels, pad=0.02, fraction=0.05, aspect=22, extend=extend, extendfrac=0.04
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label(label)
    return bar


def name_axes(axes: Any, x: str, y: str) -> None:
    """Name both axes; an empty text names none."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def colour_map(name: str, *, empty: str) -> Any:
    """A colour map of matplotlib with a colour for what is not a number."""
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad=empty)


def ticks_of(number: int, *, most: int = 16) -> list[int]:
    """0, 1, 2, ... of number, thinned by halves to at most `most`."""
    stride = next(s for s in (1, 2, 4, 8, 16, 32, 64, number) if number / s <= most)
    return list(range(0, number, stride))
