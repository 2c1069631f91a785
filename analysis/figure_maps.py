"""Maps of a trace: who is used, together with whom, for what, and which layers agree.

Functions take arrays of the analysis and return a matplotlib Figure built without pyplot, so that
nothing global changes: a notebook shows it, `figure.savefig(path)` saves it. Orange to purple about
a neutral value, and viridis for what grows from nothing, are told apart with every common kind of
colour blindness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.bootstrap import Interval
from analysis.figure_frame import (
    EMPTY,
    INK,
    colour_bar,
    colour_map,
    name_axes,
    panels_of,
    styled,
    ticks_of,
    write_titles,
)

Floats = NDArray[np.float64]

_NUMBERS_UP_TO = 160  # cells of a map that still hold their number
_MAX_PANELS = 12
_FACTORS = (1.25, 1.5, 2.0, 4.0)  # ends of the colour scale; what is beyond has the end's colour


def load_map(
    ratio: ArrayLike, *, is_clear: ArrayLike | None = None, title: str = "Expert load"
) -> Any:
    """(L, E) load ratios (analysis.utilisation) -> layers x experts; the dead are crossed out.

    is_clear (L, E), true where an interval excludes 1 (an even share), writes that number bold.
    """
    ratio_LE = _matrix("ratio", ratio)
    with styled():
        figure, (axes,) = panels_of(
            1,
            width=2.2 + 0.34 * min(ratio_LE.shape[1], 40),
            height=1.5 + 0.26 * min(len(ratio_LE), 40),
        )
        is_dead_LE, factor = ratio_LE == 0, ratio_factor(ratio_LE)
        image = _ratio_image(axes, np.where(is_dead_LE, np.nan, ratio_LE), factor=factor)
        layers, experts = np.nonzero(is_dead_LE)
        axes.plot(experts, layers, "x", color="white", ms=5, mew=1.4)
        is_written = _write_numbers(axes, ratio_LE, image, skip=is_dead_LE, bold=is_clear)
        name_axes(axes, "expert", "layer")
        dead = (
            f"{is_dead_LE.sum()} of {ratio_LE.size} dead (x)" if is_dead_LE.any() else "none dead"
        )
        bold = "; bold: the interval excludes 1" if is_written and is_clear is not None else ""
        below = f"tokens over an even share, 1/{ratio_LE.shape[1]}; {dead}{bold}"
        write_titles(figure, title, below)
        ratio_bar(figure, image, [axes], "times the even share", factor=factor)
        return figure


def co_activation_map(
    ratio: ArrayLike, *, layers: Sequence[int] | None = None, title: str = "Experts chosen together"
) -> Any:
    """(L, E, E) normalised_co_activation -> a panel for each layer, at most 12 of them."""
    ratio_LEE = np.asarray(ratio, dtype=np.float64)
    shown = some_layers(len(ratio_LEE), layers)
    factor = ratio_factor(ratio_LEE[shown])
    with styled():
        figure, panels = panels_of(len(shown), width=2.75, height=2.6)
        image = None
        for axes, layer in zip(panels, shown, strict=True):
            image = _ratio_image(axes, ratio_LEE[layer], factor=factor, empty=EMPTY, ticks=8)
            axes.set_title(f"layer {layer}", fontsize=9.5)
            axes.set_aspect("equal")
            name_axes(axes, "expert", "expert" if axes.get_subplotspec().is_first_col() else "")
        write_titles(
            figure, title, "observed over chance of the same loads; grey: the pair cannot occur"
        )
        ratio_bar(figure, image, panels, "times chance", factor=factor)
        return figure


def domain_map(
    ratio: ArrayLike,
    domains: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    is_clear: ArrayLike | None = None,
    key: str = "domain",
    title: str = "What experts are chosen for",
) -> Any:
    """(L, D, E) lift (analysis.specialisation) -> domains x experts, a panel for each layer, to 12.

    is_clear (L, D, E), true where an interval excludes 1 (no preference), puts a dot there. With
    key "position" the rows are such buckets instead, or what else tokens were counted by.
    """
    ratio_LDE = np.asarray(ratio, dtype=np.float64)
    if ratio_LDE.ndim != 3 or ratio_LDE.shape[1] != len(domains):
        raise ValueError(
            f"ratio: got {ratio_LDE.shape} for {len(domains)} domains; it is (L, D, E)."
        )
    shown = some_layers(len(ratio_LDE), layers)
    factor = ratio_factor(ratio_LDE[shown])
    with styled():
        columns = min(len(shown), 2)
        figure, panels = panels_of(
            len(shown),
            width=1.4 + 0.24 * min(ratio_LDE.shape[2], 32),
            height=0.85 + 0.27 * len(domains),
            columns=columns,
        )
        image = None
        for axes, layer in zip(panels, shown, strict=True):
            image = _ratio_image(axes, ratio_LDE[layer], factor=factor, empty=EMPTY)
            axes.set_title(f"layer {layer}", fontsize=9.5)
            is_first = axes.get_subplotspec().is_first_col()
            # domains say what they are; numbers do not
            name_axes(axes, "expert", key if is_first and key != "domain" else "")
            axes.set_yticks(range(len(domains)), list(domains) if is_first else [])
            if is_clear is not None:
                rows, experts = np.nonzero(np.asarray(is_clear)[layer])
                axes.plot(experts, rows, "o", color=INK, ms=2.6, mec="white", mew=0.4)
        dots = "" if is_clear is None else "; dot: the interval excludes 1"
        write_titles(
            figure, title, f"share of the {key} over share of all tokens; grey: none{dots}"
        )
        ratio_bar(figure, image, panels, "times the share of all", factor=factor)
        return figure


def layer_agreement_map(agreement: ArrayLike, *, title: str = "Agreement between layers") -> Any:
    """(L, L) of analysis.layer_agreement -> a map; the diagonal, always 1, is left out."""
    agreement_LL = _matrix("agreement", agreement)
    with styled():
        side = 1.6 + 0.3 * min(len(agreement_LL), 20)
        figure, (axes,) = panels_of(1, width=side + 0.9, height=side)
        others = np.where(np.eye(len(agreement_LL), dtype=bool), np.nan, agreement_LL)
        top = max(0.05, float(np.nan_to_num(others).max()))
        image = axes.imshow(others, cmap=colour_map("viridis", empty=EMPTY), vmin=0, vmax=top)
        _separate(axes, agreement_LL.shape)
        _write_numbers(axes, others, image, skip=np.isnan(others))
        name_axes(axes, "layer", "layer")
        write_titles(figure, title, "what the first choice of one says about that of the other")
        colour_bar(figure, image, [axes], "share of the uncertainty")
        return figure


def effect_map(
    effect: Interval,
    domains: Sequence[str],
    *,
    rows: Sequence[str],
    title: str = "What taking an expert away costs",
) -> Any:
    """Interval (A, D) of analysis.ablation -> ablations x domains; dots where it excludes zero.

    rows names the ablations. The scale reaches as far as the largest effect on both sides of zero.
    """
    effect_AD = _matrix("effect", effect.estimate)
    if effect_AD.shape != (len(rows), len(domains)):
        raise ValueError(
            f"effect: got {effect_AD.shape} for {len(rows)} rows and {len(domains)} domains."
        )
    with styled():
        figure, (axes,) = panels_of(
            1, width=2.6 + 0.7 * len(domains), height=0.9 + 0.27 * len(rows)
        )
        end = max(float(np.nan_to_num(np.abs(effect_AD)).max()), 1e-6)
        image = axes.imshow(
            effect_AD, cmap=colour_map("PuOr_r", empty=EMPTY), vmin=-end, vmax=end, aspect="auto"
        )
        _separate(axes, effect_AD.shape)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_xticks(range(len(domains)), list(domains))
        clear_rows, clear_columns = np.nonzero(effect.excludes_zero)
        axes.plot(clear_columns, clear_rows, "o", color=INK, ms=3, mec="white", mew=0.5)
        below = f"more loss than with it; dot: the {effect.level:.0%} interval excludes zero"
        write_titles(figure, title, below)
        colour_bar(figure, image, [axes], "nats per token")
        return figure


def ratio_factor(ratio: Floats) -> float:
    """The smallest round factor that nine tenths of the ratios are within, at most 4."""
    seen = ratio[np.isfinite(ratio) & (ratio > 0)]
    if not len(seen):
        return _FACTORS[0]
    far = float(np.quantile(np.exp2(np.abs(np.log2(seen))), 0.9))
    return next((factor for factor in _FACTORS if far <= factor), _FACTORS[-1])


def _ratio_image(
    axes: Any, ratio: Floats, *, factor: float, empty: str = INK, ticks: int = 16
) -> Any:
    # by factors: half and twice are equally far from 1; what is further has the colour of the end
    end = np.log2(factor)
    with np.errstate(divide="ignore"):
        power = np.clip(np.log2(ratio), -end, end)
    orange = colour_map("PuOr_r", empty=empty)
    image = axes.imshow(power, cmap=orange, vmin=-end, vmax=end, aspect="auto")
    _separate(axes, ratio.shape, most=ticks)
    return image


def _separate(axes: Any, shape: tuple[int, ...], *, most: int = 16) -> None:
    # white lines between cells, where there are few enough to see them
    if shape[0] * shape[1] <= 1024:
        axes.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=1.0 if max(shape) <= 20 else 0.5)
    axes.tick_params(which="both", length=0)
    axes.set_xticks(ticks_of(shape[1], most=most))
    axes.set_yticks(ticks_of(shape[0], most=most))
    axes.spines[:].set_visible(False)


def _write_numbers(
    axes: Any, value: Floats, image: Any, *, skip: NDArray[np.bool_], bold: ArrayLike | None = None
) -> bool:
    if value.size > _NUMBERS_UP_TO:
        return False
    is_bold = np.zeros(value.shape, bool) if bold is None else np.asarray(bold)
    shown = image.get_array()
    for row, column in np.argwhere(~skip & ~np.isnan(value)):
        red, green, blue, _ = image.cmap(image.norm(shown[row, column]))
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column,
            row,
            f"{value[row, column]:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if is_dark else INK,
            fontweight="bold" if is_bold[row, column] else "normal",
        )
    return True


def ratio_bar(figure: Any, image: Any, panels: list[Any], label: str, *, factor: float) -> None:
    """A colour bar of powers of two, named by their factors; its ends hold what is beyond."""
    bar = colour_bar(figure, image, panels, label, extend="both")
    steps = [factor] if factor < 2 else [2.0**power for power in range(1, int(np.log2(factor)) + 1)]
    under = {1.25: "4/5", 1.5: "2/3", 2.0: "1/2", 4.0: "1/4"}
    ticks = [-np.log2(step) for step in reversed(steps)] + [0.0] + [np.log2(s) for s in steps]
    names = [under[step] for step in reversed(steps)] + ["1"] + [f"{step:g}" for step in steps]
    bar.set_ticks(ticks, labels=names)


def _matrix(name: str, value: ArrayLike) -> Floats:
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"{name}: got shape {matrix.shape}; it must have two axes and a number.")
    return matrix


def some_layers(num_layers: int, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, or at most 12 of them, evenly spaced, the first and last among them."""
    if layers is None:
        few = np.linspace(0, num_layers - 1, min(num_layers, _MAX_PANELS))
        return [int(layer) for layer in np.round(few)]
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(f"layers: got {list(layers)}; they must be 0 to {num_layers - 1}.")
    return list(layers)
