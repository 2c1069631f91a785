"""Figures show the numbers that they were given, at any size, and all their text can be read.

For analysis.figure_maps, figure_curves, figure_steps, figure_learning and figure_frame.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from analysis.bootstrap import Interval
from analysis.figure_curves import (
    explained_curves,
    interval_points,
    margin_fan,
    saturation_curves,
)
from analysis.figure_learning import difference_figure, final_figure, learning_figure
from analysis.figure_maps import (
    co_activation_map,
    domain_map,
    effect_map,
    layer_agreement_map,
    load_map,
)
from analysis.figure_steps import layer_curves, load_over_steps, settling
from analysis.figure_trace import position_figure
from analysis.key_counts import NUM_POSITION_BUCKETS, KeyCounts
from analysis.learning_curves import LearningCurve
from analysis.margins import MARGIN_EDGES, quantile_of_margins
from analysis.over_steps import LogSeries


def interval(estimate: np.ndarray, width: float = 0.05) -> Interval:
    return Interval(estimate, estimate - width, estimate + width, 0.95, 40)


def source() -> np.random.Generator:
    return np.random.default_rng(0)


def histogram(layers: int, choices: int) -> np.ndarray:
    return source().integers(0, 50, size=(layers, choices, len(MARGIN_EDGES) - 1))


def ratios(*shape: int) -> np.ndarray:
    return source().gamma(4, 0.25, size=shape)


def series(blocks: int, layers: int, experts: int) -> LogSeries:
    load = source().gamma(2, 1, size=(blocks, layers, experts))
    load[0, 0, 0] = 0
    load /= load.sum(axis=-1, keepdims=True)
    steps = 10.0 * np.arange(blocks) + 5
    return LogSeries(
        step_B=steps, load_BLE=load, variation_BL=load.std(axis=-1) * experts,
        chance_B=np.full(blocks, 0.05), entropy_BL=np.full((blocks, layers), 1.5),
        dead_B=np.zeros(blocks, int), loss_B=9 - steps / steps.max(),
        balance_B=np.full(blocks, 2.0),
    )  # fmt: skip


def curves(arms: int, seeds: int) -> list[LearningCurve]:
    return [
        LearningCurve(
            f"an arm with a long name {arm}", seed, 1e6 * np.arange(1, 7), 1e13 * np.arange(1, 7),
            3 + 0.1 * arm + source().random(6)[::-1] + 0.01 * seed,
            {"code": 3.1, "prose": 3.2 + arm},
        )
        for arm in range(arms)
        for seed in range(seeds)
    ]  # fmt: skip


def positions(buckets: int) -> KeyCounts:
    choice = np.zeros((2, NUM_POSITION_BUCKETS, 16), int)
    choice[:, :buckets] = source().integers(1, 50, size=(2, buckets, 16))
    return KeyCounts(choice, choice[0].sum(axis=-1), 1)


FIGURES: dict[str, Callable[[], Any]] = {
    "load": lambda: load_map(ratios(8, 16)),
    "load of one expert": lambda: load_map([[1.0]]),
    "load, deep and wide": lambda: load_map(ratios(48, 128)),
    "load without a token": lambda: load_map(np.full((2, 4), np.nan)),
    "pairs": lambda: co_activation_map(ratios(32, 16, 16)),
    "pairs of two": lambda: co_activation_map(np.full((1, 2, 2), np.nan)),
    "pairs of many": lambda: co_activation_map(ratios(2, 128, 128)),
    "domains": lambda: domain_map(ratios(4, 3, 16), ["prose", "code", "mathematics"]),
    "one domain": lambda: domain_map(ratios(1, 1, 4), ["prose"]),
    "agreement": lambda: layer_agreement_map(source().random((8, 8))),
    "agreement of one": lambda: layer_agreement_map([[1.0]]),
    "agreement of many": lambda: layer_agreement_map(source().random((40, 40))),
    "effect": lambda: effect_map(
        interval(source().normal(size=(16, 3))),
        ["prose", "code", "mathematics"],
        rows=[f"layer 3, expert {e}" for e in range(16)],
    ),
    "saturation": lambda: saturation_curves(
        [0, 100, 1000], [interval(source().random(8))] * 3, chance=[0.125] * 8
    ),
    "saturation of one": lambda: saturation_curves([5], [interval(np.array([0.5]))]),
    "margins": lambda: margin_fan(histogram(8, 2)),
    "margins of many": lambda: margin_fan(histogram(32, 8)),
    "margins of none": lambda: margin_fan(np.zeros((2, 1, len(MARGIN_EDGES) - 1), int)),
    "load, sure": lambda: load_map(ratios(2, 16), is_clear=np.ones((2, 16), bool)),
    "points": lambda: interval_points(
        {name: {"": interval(source().random(2))} for name in ("One", "Max violation", "Gini")},
        title="Points",
        below="below",
    ),
    "points of two series": lambda: interval_points(
        {
            "A panel with a name": {
                "one": interval(source().random(32)),
                "two": interval(source().random(32)),
            }
        },
        title="Points",
        below="below",
        labels={"A panel with a name": "share"},
    ),
    "over steps": lambda: load_over_steps(series(60, 2, 16)),
    "over steps, deep and wide": lambda: load_over_steps(series(60, 48, 128)),
    "over one step": lambda: load_over_steps(series(1, 1, 4)),
    "settling": lambda: settling(series(60, 8, 16)),
    "settling of one step": lambda: settling(series(1, 1, 4)),
    "layer curves": lambda: layer_curves(
        [5, 50], [interval(source().random(4))] * 2, title="Title", below="below", label="share"
    ),
    "positions": lambda: position_figure(positions(7)),
    "all positions": lambda: position_figure(positions(NUM_POSITION_BUCKETS)),
    "learning": lambda: learning_figure(curves(7, 3)),
    "learning of two runs": lambda: learning_figure(curves(2, 1)),
    "ends": lambda: final_figure(curves(7, 3)),
    "ends of two runs": lambda: final_figure(curves(2, 1)),
    "differences": lambda: difference_figure(curves(4, 3)),
    "explained": lambda: explained_curves(
        {"token id": source().random(8), "domain": source().random(8), "position": [0.0] * 8}
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_text_lies_within_the_figure_and_titles_and_names_do_not_meet(name: str) -> None:
    figure = FIGURES[name]()
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text().strip()]
    assert len(boxes) >= 3
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for (one, box), (two, other) in combinations(boxes, 2):
        assert not box.overlaps(other), f"{one!r} lies over {two!r}"
    for axes in figure.axes:
        ticks = [t for t in axes.get_xticklabels() if t.get_text() and t.get_visible()]
        extents = [t.get_window_extent(renderer) for t in ticks]
        for one, two in pairwise(extents):
            assert not one.overlaps(two), f"tick labels of {axes.get_title(loc='left')}"


def test_the_load_map_shows_factors_and_crosses_out_the_dead() -> None:
    ratio = np.array([[2.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    axes = load_map(ratio, title="Load of a run").axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown[0, :3], [1.0, -1.0, 0.0])
    assert np.argwhere(np.ma.getmaskarray(shown) | np.isnan(shown.data)).tolist() == [[0, 3]]
    assert axes.lines[0].get_xydata().tolist() == [[3.0, 0.0]]
    norm = axes.images[0].norm
    assert norm(0.0) == 0.5, "an even share has the neutral colour"
    assert [t.get_text() for t in axes.texts] == ["2.00", "0.50", "1.00"] + ["1.00"] * 4
    texts = [t.get_text() for t in axes.figure.texts]
    assert texts == ["Load of a run", "tokens over an even share, 1/4; 1 of 8 dead (x)"]


def test_what_is_beyond_the_scale_has_the_colour_of_its_end() -> None:
    ratio = np.full((4, 8), 1.0)
    ratio[0, 0], ratio[1, 1] = 30.0, 0.001
    shown = load_map(ratio).axes[0].images[0]
    assert shown.get_array().max() == shown.norm.vmax == pytest.approx(np.log2(1.25))
    assert shown.get_array().min() == shown.norm.vmin


def test_panels_are_the_layers_asked_for_or_spread_over_all() -> None:
    ratio = ratios(32, 4, 4)
    named = [a.get_title(loc="left") for a in co_activation_map(ratio).axes[:-1]]
    assert len(named) == 12
    assert named[0] == "layer 0"
    assert named[-1] == "layer 31"
    figure = co_activation_map(ratio, layers=[3, 30])
    assert [a.get_title(loc="left") for a in figure.axes[:-1]] == ["layer 3", "layer 30"]
    image = figure.axes[1].images[0]
    end = image.norm.vmax
    np.testing.assert_allclose(image.get_array(), np.clip(np.log2(ratio[30]), -end, end))


def test_dots_are_where_intervals_are_clear() -> None:
    is_clear = np.zeros((2, 3, 4), bool)
    is_clear[1, 2, 3] = is_clear[1, 0, 1] = True
    figure = domain_map(ratios(2, 3, 4), ["a", "b", "c"], is_clear=is_clear)
    assert len(figure.axes[0].lines[0].get_xydata()) == 0
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[1.0, 0.0], [3.0, 2.0]]
    effect = interval(np.array([[0.1, -0.2], [0.01, 0.0]]))
    axes = effect_map(effect, ["a", "b"], rows=["x", "y"]).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.0, 0.0], [1.0, 0.0]]
    np.testing.assert_array_equal(axes.images[0].get_array(), effect.estimate)
    assert axes.images[0].norm(0.0) == 0.5


def test_curves_hold_the_numbers_and_their_bands() -> None:
    values = [interval(np.array([0.2, 0.3])), interval(np.array([0.6, 1.0]))]
    axes = saturation_curves([10, 50], values, chance=[0.1, 0.3]).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[10.0, 0.2], [50.0, 0.6]]
    assert axes.lines[1].get_xydata().tolist() == [[10.0, 0.3], [50.0, 1.0]]
    assert list(axes.lines[2].get_ydata()) == [pytest.approx(0.2)] * 2, "chance, dashed"
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.15)
    assert band[:, 1].max() == pytest.approx(0.65)
    counts = histogram(3, 2)
    panels = margin_fan(counts).axes
    for k in range(2):
        middle = panels[k].lines[0].get_ydata()
        np.testing.assert_allclose(middle[1:-1], quantile_of_margins(counts[:, k], 0.5))
    curve = explained_curves({"domain": [0.1, 0.4]}).axes[0].lines[0]
    assert curve.get_xydata().tolist() == [[0.0, 0.1], [1.0, 0.4]]


def test_cells_over_steps_are_factors_and_lie_where_their_steps_are() -> None:
    shown = series(4, 3, 16)
    figure = load_over_steps(shown, layers=[2])
    mesh = figure.axes[0].collections[0]
    end = mesh.norm.vmax
    ratio = shown.load_BLE[:, 2].T * 16
    np.testing.assert_allclose(mesh.get_array(), np.clip(np.log2(ratio), -end, end))
    assert mesh.norm(0.0) == 0.5
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges.tolist() == [5, 10, 20, 30, 35], "half way between the blocks' middles"


def test_points_and_their_intervals_are_the_numbers() -> None:
    one, two = interval(np.array([0.2, 0.4])), interval(np.array([0.3, 0.1]), 0.01)
    axes = interval_points({"Panel": {"one": one, "two": two}}, title="T", below="b").axes[0]
    marked = {line.get_label(): line for line in axes.lines}
    assert marked["one"].get_ydata().tolist() == [0.2, 0.4]
    assert marked["two"].get_ydata().tolist() == [0.3, 0.1]
    bars = [path.vertices[:, 1].tolist() for path in axes.collections[1].get_paths()]
    np.testing.assert_allclose(bars, [[0.29, 0.31], [0.09, 0.11]])
    assert not set(marked["one"].get_xdata()) & set(marked["two"].get_xdata())


def test_numbers_are_bold_where_an_interval_is_clear() -> None:
    axes = load_map([[2.0, 1.0]], is_clear=[[True, False]]).axes[0]
    assert [text.get_fontweight() for text in axes.texts] == ["bold", "normal"]


def test_a_learning_curve_is_the_mean_of_its_seeds_with_each_seed_beside_it() -> None:
    runs = curves(2, 3)
    tokens, flops = learning_figure(runs).axes[:2]
    mean = np.mean([run.loss_P for run in runs[:3]], axis=0)
    for axes in (tokens, flops):
        drawn = [line.get_ydata() for line in axes.lines[:4]]
        np.testing.assert_allclose(drawn, [*(run.loss_P for run in runs[:3]), mean])
    np.testing.assert_allclose(flops.lines[3].get_xdata(), runs[0].flops_P)


def test_a_figure_saves_the_same_bytes_twice_and_leaves_the_style_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for name in ("one.png", "two.png"):
        load_map(ratios(3, 4)).savefig(tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_no_window_system_is_loaded() -> None:
    program = (
        "import sys; from analysis.figure_maps import load_map; load_map([[1.0, 2.0]]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: load_map([1.0, 2.0]), r"ratio: got shape \(2,\)"),
        (lambda: layer_agreement_map(np.zeros((0, 0))), "agreement: got shape"),
        (lambda: domain_map(ratios(2, 3, 4), ["a"]), "for 1 domains"),
        (lambda: co_activation_map(ratios(2, 4, 4), layers=[2]), r"layers: got \[2\]"),
        (lambda: saturation_curves([1], []), "steps: got 1 for 0"),
        (lambda: interval_points({}, title="", below=""), "panels: each needs 1 to 7"),
        (lambda: layer_curves([1], [], title="", below="", label=""), "steps: got 1 for 0"),
        (lambda: learning_figure(curves(8, 1)), "curves: got 8 arms"),
        (lambda: difference_figure(curves(1, 2)), "curves: got one arm"),
        (lambda: explained_curves({}), "explained: got 0 curves"),
        (lambda: effect_map(interval(np.zeros((2, 2))), ["a"], rows=["x"]), "effect: got"),
    ],
)
def test_what_does_not_fit_is_refused(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()
