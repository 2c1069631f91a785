"""The picture of a run: loss against the unigram entropy, experts' load, and small panels below."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from analysis.utilisation import coefficient_of_variation, dead_experts, load_ratio

Floats = NDArray[np.float64]
Record = dict[str, Any]

# Okabe and Ito's palette, told apart with every common kind of colour blindness
_BLUE, _ORANGE, _GREEN, _PINK, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B7280"
_INK, _PALE = "#1F2937", "#E5E7EB"
_LAST_RECORDS = 20  # the heat map is the mean of the last records, one batch alone is noisy
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": "#9CA3AF",
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlecolor": _INK,
    "axes.axisbelow": True,
    "grid.color": _PALE,
    "grid.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def run_picture(metrics: list[Record], *, title: str, path: str | Path) -> Path:
    """Draw a PNG of the records of a metrics.jsonl (moe.train.metrics.read_metrics).

    Left: training loss, raw and smoothed, validation loss, and the unigram entropy of the
    validation tokens. Right, for models with experts: load over its ideal for each layer and
    expert at the end, dead experts marked with a cross. Below: learning rate, gradient norm, and
    load imbalance over time. Works for runs of one step and for dense models; returns the path.
    Raises ValueError for metrics without a training record.
    """
    from matplotlib import rc_context

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with rc_context(STYLE):
        run_figure(metrics, title=title).savefig(temporary, format="png")
    os.replace(temporary, path)  # a picture that is looked at is never half written
    return path


def run_figure(metrics: list[Record], *, title: str) -> Any:
    """The matplotlib Figure that run_picture saves; build and draw it in rc_context(STYLE)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [r for r in metrics if r.get("kind", "train") == "train" and "loss" in r]
    validation = [r for r in metrics if _is_number(r.get("validation/loss"))]
    if not train:
        raise ValueError("metrics: no record of kind 'train'; there is nothing to draw.")
    routed = [r for r in train if _has_load(r)]
    figure = Figure(figsize=(12, 7.4), dpi=150)
    FigureCanvasAgg(figure)  # a figure of our own: no pyplot, no window, no global state
    axes = _arrange(figure, has_experts=bool(routed))
    figure.text(0.065, 0.965, title, va="top", fontsize=15, fontweight="bold")
    figure.text(0.985, 0.96, _summary(train, validation), ha="right", va="top", color=_GREY)
    _draw_loss(axes["loss"], train, validation)
    _draw_series(axes["lr"], train, "lr", title="Learning rate", colour=_BLUE)
    _draw_series(axes["grad"], train, "grad_norm", title="Gradient norm", colour=_BLUE)
    if routed:
        _draw_map(figure, axes["map"], routed)
        _draw_imbalance(axes["balance"], routed)
    return figure


def smooth(values: Floats, *, width: int) -> Floats:
    """(N,) -> (N,): mean over the width finite values around each point, fewer at both ends."""
    is_finite = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(is_finite, values, 0.0), kernel, mode="full")
    number = np.convolve(is_finite.astype(np.float64), kernel, mode="full")
    start = (width - 1) // 2
    total, number = total[start : start + len(values)], number[start : start + len(values)]
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0.5)


def _arrange(figure: Any, *, has_experts: bool) -> dict[str, Any]:
    # fixed margins: an automatic layout shrinks the panels when a label is long
    above = figure.add_gridspec(
        1,
        2 if has_experts else 1,
        left=0.065,
        right=0.94 if has_experts else 0.985,
        top=0.865,
        bottom=0.4,
        wspace=0.14,
    )
    below = figure.add_gridspec(
        1, 3 if has_experts else 2, left=0.065, right=0.985, top=0.275, bottom=0.07, wspace=0.22
    )
    axes = {"loss": figure.add_subplot(above[0])}
    axes["lr"], axes["grad"] = figure.add_subplot(below[0]), figure.add_subplot(below[1])
    if has_experts:
        axes["map"], axes["balance"] = figure.add_subplot(above[1]), figure.add_subplot(below[2])
    return axes


def _draw_loss(axes: Any, train: list[Record], validation: list[Record]) -> None:
    step, loss = _series(train, "loss")
    few = len(step) < 30
    axes.plot(
        step, loss, color=_BLUE, lw=1.4 if few else 0.7, alpha=1.0 if few else 0.28,
        marker="o" if few else None, ms=3.5, label="training" if few else None,
    )  # fmt: skip
    if not few:
        width = max(3, len(step) // 40) | 1
        axes.plot(step, smooth(loss, width=width), color=_BLUE, lw=2, label="training, smoothed")
    skipped = [r["step"] for r in train if r.get("skipped")]
    if skipped:
        bottom = axes.get_xaxis_transform()
        axes.plot(
            skipped, [0.015] * len(skipped), "|", color=_PINK, ms=9, mew=1.6, transform=bottom,
            label=f"skipped step ({len(skipped)})",
        )  # fmt: skip
    if validation:
        at, value = _series(validation, "validation/loss")
        axes.plot(at, value, "o-", color=_ORANGE, lw=1.2, ms=6, mec="white", label="validation")
        if np.isfinite(value[-1]):
            axes.annotate(
                f"{value[-1]:.3f}", (at[-1], value[-1]), (0, 9), textcoords="offset points",
                ha="right", color=_ORANGE, fontweight="bold",
            )  # fmt: skip
    unigram = [r["validation/unigram_entropy"] for r in validation
               if _is_number(r.get("validation/unigram_entropy"))]  # fmt: skip
    if unigram:
        axes.axhline(unigram[-1], color=_GREY, lw=1.2, ls=(0, (5, 3)))
        axes.annotate(
            f"unigram entropy of the validation tokens, {unigram[-1]:.3f}", (1, unigram[-1]),
            (-2, 4), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            ha="right", va="bottom", color=_GREY,
        )  # fmt: skip
    axes.set_title("Loss")
    axes.set_ylabel("cross-entropy (nats per token)")
    _finish(axes, step)
    _legend_beside_title(axes)


def _draw_map(figure: Any, axes: Any, routed: list[Record]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    last = routed[-_LAST_RECORDS:]
    shape = np.shape(last[-1]["router/load_LE"])
    same = [r["router/load_LE"] for r in last if np.shape(r["router/load_LE"]) == shape]
    load_LE = np.asarray(same, dtype=np.float64).sum(axis=0)
    ratio_LE, dead_LE = load_ratio(load_LE), dead_experts(load_LE)
    num_layers, num_experts = shape
    top = max(2.0, float(np.ceil(np.nan_to_num(ratio_LE).max() * 2) / 2))
    image = axes.imshow(
        np.ma.masked_where(dead_LE, ratio_LE), aspect="auto", interpolation="nearest",
        cmap=colormaps["PuOr"].with_extremes(bad=_INK),
        norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=top),
    )  # fmt: skip
    axes.set_xticks(np.arange(num_experts + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_layers + 1) - 0.5, minor=True)
    if num_layers * num_experts <= 1024:
        axes.grid(which="minor", color="white", lw=1.2)
    axes.tick_params(which="both", length=0)
    axes.set_xticks(_some_ticks(num_experts))
    axes.set_yticks(_some_ticks(num_layers))
    axes.spines[:].set_visible(False)
    if num_layers * num_experts <= 160:
        for layer, expert in np.argwhere(~dead_LE):
            ratio = ratio_LE[layer, expert]
            strength = (ratio - 1) / (top - 1) if ratio > 1 else 1 - ratio
            axes.text(
                expert, layer, f"{ratio:.2f}", ha="center", va="center", fontsize=7.5,
                color="white" if strength > 0.62 else _INK,
            )  # fmt: skip
    layers, experts = np.nonzero(dead_LE)
    axes.plot(experts, layers, "x", color="white", ms=6, mew=1.6)
    dead = f"{dead_LE.sum()} of {dead_LE.size} dead (x)" if dead_LE.any() else "no expert dead"
    of_records = f"last {len(same)} records  ·  " if len(same) > 1 else ""
    axes.set_title("Expert load")
    axes.text(
        1, 1.022, f"relative to 1/{num_experts}  ·  {of_records}{dead}", color=_GREY,
        ha="right", va="bottom", fontsize=8.5, transform=axes.transAxes,
    )  # fmt: skip
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    bar = figure.colorbar(image, cax=axes.inset_axes((1.018, 0, 0.022, 1)))
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.5, 1, *np.linspace(1, top, 3)[1:]])
    bar.ax.set_yticklabels([f"{t:.3g}x" for t in bar.get_ticks()])


def _draw_imbalance(axes: Any, routed: list[Record]) -> None:
    step = np.array([r["step"] for r in routed], dtype=np.float64)
    variation = [coefficient_of_variation(r["router/load_LE"]) for r in routed]
    worst = np.array([np.nan_to_num(v).max() for v in variation])
    mean = np.array([np.nan_to_num(v).mean() for v in variation])
    for values, colour, label in ((worst, _ORANGE, "worst layer"), (mean, _GREEN, "mean")):
        _draw_line(axes, step, values, colour=colour, label=label)
    axes.set_title("Load imbalance")
    axes.set_ylabel("deviation / mean")
    _from_zero(axes, worst)
    _finish(axes, step)
    _legend_beside_title(axes)


def _draw_series(axes: Any, train: list[Record], key: str, *, title: str, colour: str) -> None:
    step, values = _series(train, key)
    axes.set_title(title)
    if len(step) == 0:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    if key == "lr":
        axes.plot(step, values, color=colour, lw=1.8, marker="o" if len(step) < 30 else None, ms=3)
        _from_zero(axes, values)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-"))
    else:
        _draw_line(axes, step, values, colour=colour, label=None)
        finite = values[np.isfinite(values) & (values > 0)]
        if len(finite) and finite.max() > 20 * np.median(finite):
            axes.set_yscale("log")
        else:
            _from_zero(axes, values)
    _finish(axes, step)


def _draw_line(axes: Any, step: Floats, values: Floats, *, colour: str, label: str | None) -> None:
    if len(step) < 30:
        axes.plot(step, values, color=colour, lw=1.4, marker="o", ms=3, label=label)
        return
    axes.plot(step, values, color=colour, lw=0.6, alpha=0.3)
    width = max(3, len(step) // 40) | 1
    axes.plot(step, smooth(values, width=width), color=colour, lw=1.8, label=label)


def _from_zero(axes: Any, values: Floats) -> None:
    top = float(np.max(values[np.isfinite(values)], initial=0.0))
    axes.set_ylim(0, 1.08 * top if top > 0 else 1.0)


def _legend_beside_title(axes: Any) -> None:
    # outside the axes, where no curve can run behind it
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.005, 0.985), ncols=4, fontsize=8.5, borderpad=0.2,
        handlelength=1.3, columnspacing=1.0, handletextpad=0.5,
    )  # fmt: skip


def _finish(axes: Any, step: Floats) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(visible=True, axis="y")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    margin = max(0.015 * (step[-1] - step[0]), 0.5)
    axes.set_xlim(step[0] - margin, step[-1] + margin)


def _summary(train: list[Record], validation: list[Record]) -> str:
    parts = [f"step {train[-1]['step']:,}"]
    if _is_number(train[-1].get("tokens_seen")):
        parts.append(f"{_short(train[-1]['tokens_seen'])} tokens")
    speeds = [r["tokens_per_second"] for r in train if _is_number(r.get("tokens_per_second"))]
    if speeds:
        parts.append(f"{_short(float(np.median(speeds)))} tokens/s")
    last = validation[-1] if validation else {}
    loss, unigram = last.get("validation/loss"), last.get("validation/unigram_entropy")
    if _is_number(loss) and _is_number(unigram) and unigram > 0:
        parts.append(f"validation {loss / unigram - 1:+.0%} against unigram entropy")
    if _is_number(last.get("validation/bits_per_byte")):
        parts.append(f"{last['validation/bits_per_byte']:.3f} bits/byte")
    return "  ·  ".join(parts)


def _series(records: list[Record], key: str) -> tuple[Floats, Floats]:
    points = [(r["step"], r[key]) for r in records if _is_number(r.get(key))]
    both = np.array(points, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _some_ticks(number: int) -> list[int]:
    stride = next(s for s in (1, 2, 4, 8, 16, 32, 64, number) if number / s <= 16)
    return list(range(0, number, stride))


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _has_load(record: Record) -> bool:
    load_LE = np.asarray(record.get("router/load_LE", ()), dtype=np.float64)
    return load_LE.ndim == 2 and load_LE.size > 0 and bool(np.isfinite(load_LE).all())


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
