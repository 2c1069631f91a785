"""Figures of a run over its steps: how the load spreads, and how its numbers settle.

Functions take arrays of analysis.over_steps and return a matplotlib Figure, as figure_maps do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.bootstrap import Interval
from analysis.figure_curves import layer_bar, layer_colour, saturation_curves
from analysis.figure_frame import (
    GREY,
    colour_map,
    name_axes,
    panels_of,
    styled,
    ticks_of,
    write_titles,
)
from analysis.figure_maps import ratio_bar, ratio_factor, some_layers
from analysis.over_steps import LogSeries, count_blocks, domain_dependence, saturation_over
from analysis.overlap import chance_saturation
from analysis.utilisation import load_ratio
from moe.errors import DataError
from moe.trace.read import Trace

Floats = NDArray[np.float64]


def load_over_steps(
    series: LogSeries, *, layers: list[int] | None = None, title: str = "Expert load over training"
) -> Any:
    """LogSeries -> a panel for each layer, at most 12: experts x steps, load over an even share."""
    ratio_BLE = load_ratio(series.load_BLE)
    shown = some_layers(ratio_BLE.shape[1], layers)
    factor = ratio_factor(ratio_BLE[:, shown])
    num_experts = ratio_BLE.shape[-1]
    with styled():
        figure, panels = panels_of(
            len(shown), width=4.6, height=0.9 + 0.11 * min(num_experts, 24), columns=2
        )
        image = None
        for axes, layer in zip(panels, shown, strict=True):
            image = _drawn(axes, series.step_B, ratio_BLE[:, layer].T, factor)
            axes.set_title(f"layer {layer}", fontsize=9.5)
            axes.set_yticks(ticks_of(num_experts, most=8))
            name_axes(axes, "step", "expert" if axes.get_subplotspec().is_first_col() else "")
        each = f"1/{num_experts}"
        write_titles(figure, title, f"tokens over an even share, {each}; black: chosen by none")
        ratio_bar(figure, image, panels, "times the even share", factor=factor)
        return figure


def settling(series: LogSeries, *, title: str = "How routing settles") -> Any:
    """LogSeries -> training and balance loss, imbalance and router entropy of each layer."""
    _, num_layers, num_experts = series.load_BLE.shape
    with styled():
        figure, panels = panels_of(4, width=4.3, height=2.4, columns=2)
        loss, balance, variation, entropy = panels
        loss.plot(series.step_B, series.loss_B, color="#0072B2", lw=1.8)
        loss.set_title("Training loss", fontsize=10)
        loss.set_ylabel("nats per token")
        balance.plot(series.step_B, series.balance_B, color="#0072B2", lw=1.8)
        balance.set_title("Balance loss, without its coefficient", fontsize=10)
        for layer in range(num_layers):
            colour = layer_colour(layer, num_layers)
            variation.plot(series.step_B, series.variation_BL[:, layer], color=colour, lw=1.5)
            entropy.plot(series.step_B, series.entropy_BL[:, layer], color=colour, lw=1.5)
        variation.plot(series.step_B, series.chance_B, color=GREY, lw=1.2, ls=(0, (5, 3)))
        variation.set_title("Load imbalance (dashed: noise alone)", fontsize=10)
        variation.set_ylabel("deviation / mean")
        variation.set_ylim(bottom=0)
        entropy.set_title("Entropy of a token's router", fontsize=10)
        entropy.set_ylabel("nats")
        top = float(np.log(num_experts))
        entropy.axhline(top, color=GREY, lw=1.2, ls=(0, (5, 3)))
        entropy.annotate(
            f"undecided, log {num_experts}", (1, top), (-2, -4), ha="right", va="top", color=GREY,
            xycoords=entropy.get_yaxis_transform(), textcoords="offset points", fontsize=8.5,
        )  # fmt: skip
        lowest = min(float(np.nanmin(series.entropy_BL)), top - 0.02)
        # from the lowest: near log E, where routers begin, nothing shows on an axis from 0
        entropy.set_ylim(lowest - 0.06 * (top - lowest), top + 0.1 * (top - lowest))
        for axes in panels:
            axes.set_xlabel("step")
            axes.grid(visible=True, axis="y")
        layer_bar(figure, [variation, entropy], num_layers)
        dead = int(series.dead_B[-1])
        width = np.diff(series.step_B).mean() if len(series.step_B) > 1 else 1.0
        below = f"means of {width:.0f} steps; experts without a token in the last of them: {dead}"
        write_titles(figure, title, below)
        return figure


def layer_curves(
    steps: ArrayLike, values: list[Interval], *, title: str, below: str, label: str
) -> Any:
    """An Interval (L,) for each step -> a line and band for each layer, from 0."""
    at = np.asarray(steps, dtype=np.float64)
    if len(at) != len(values) or not len(at):
        raise ValueError(f"steps: got {len(at)} for {len(values)} intervals; one for each.")
    estimate, low, high = (
        np.stack([np.atleast_1d(getattr(value, name)) for value in values])
        for name in ("estimate", "low", "high")
    )
    num_layers = estimate.shape[1]
    with styled():
        figure, (axes,) = panels_of(1, width=7.4, height=3.4)
        for layer in range(num_layers):
            colour = layer_colour(layer, num_layers)
            axes.fill_between(at, low[:, layer], high[:, layer], color=colour, alpha=0.16, lw=0)
            axes.plot(
                at, estimate[:, layer], "o-", color=colour, lw=1.6, ms=4, mec="white", mew=0.5
            )
        top = float(np.nanmax([np.nan_to_num(high).max(), np.nan_to_num(estimate).max()]))
        axes.set_ylim(0, 1.1 * top if top > 0 else 1.0)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(visible=True, axis="y")
        write_titles(figure, title, below)
        layer_bar(figure, [axes], num_layers)
        return figure


def _drawn(axes: Any, step_B: Floats, ratio_EB: Floats, factor: float) -> Any:
    # cells reach half way to the next block's middle, so that the axis is in steps
    edges = np.concatenate([[step_B[0]], (step_B[1:] + step_B[:-1]) / 2, [step_B[-1]]])
    if len(step_B) == 1:
        edges = step_B[0] + np.array([-0.5, 0.5])
    end = np.log2(factor)
    with np.errstate(divide="ignore"):
        power = np.where(ratio_EB > 0, np.clip(np.log2(ratio_EB), -end, end), np.nan)
    image = axes.pcolormesh(
        edges, np.arange(len(ratio_EB) + 1) - 0.5, power, vmin=-end, vmax=end,
        cmap=colour_map("PuOr_r", empty="black"), rasterized=True,
    )  # fmt: skip
    axes.set_facecolor("black")  # under what is not a number
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def domain_figure_over_steps(trace: Trace, *, num_blocks: int = 6) -> Any:
    """The routing recorded in training -> how much the domain says about the choices, over steps.

    Raises DataError where fewer than two domains have tokens.
    """
    if sum(tokens > 0 for tokens in trace.info.tokens_of_domain) < 2:
        raise DataError(
            f"{trace.folder}: has tokens of one domain only; how much the domain decides needs two "
            "or more. Train on text with several domains (data.sources)."
        )
    steps, counted = count_blocks(trace, num_blocks=num_blocks)
    values = [domain_dependence(counts) for counts in counted]
    tokens = trace.info.num_tokens / len(steps)
    return layer_curves(
        steps, values, title="How much the domain decides", label="share of uncertainty explained",
        below=f"about {tokens:,.0f} recorded tokens a point; band: {values[0].level:.0%} interval",
    )  # fmt: skip


def saturation_figure(traces: Sequence[tuple[int, Trace]]) -> Any:
    """Traces (step, trace) of checkpoints over the same tokens -> saturation_curves."""
    found = saturation_over(traces)
    chance = chance_saturation(found.joint_LEE, top_k=traces[-1][1].info.top_k)
    return saturation_curves(
        found.steps, found.overlap, chance=chance,
        title=f"Router saturation, against step {found.last_step:,}",
    )  # fmt: skip
