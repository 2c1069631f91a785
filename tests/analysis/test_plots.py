"""The picture shows the numbers it was given, for every kind of run, and nothing overlaps."""

from __future__ import annotations

import itertools
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from analysis.plots import STYLE, run_figure, run_picture, smooth
from analysis.utilisation import coefficient_of_variation, load_ratio


def synthetic_run(
    num_steps: int, *, layers: int = 4, experts: int = 16, validate_every: int = 100
) -> list[dict[str, Any]]:
    source = np.random.default_rng(0)
    metrics: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        record = {
            "kind": "train", "step": step, "loss": 3 + 5 * math.exp(-step / 40),
            "lr": 3e-3 / step, "grad_norm": 1.0, "tokens_seen": step * 8192,
            "tokens_per_second": 8000.0, "skipped": False,
        }  # fmt: skip
        if experts:
            load_LE = source.dirichlet(np.full(experts, 5.0), size=layers)
            record["router/load_LE"] = load_LE.tolist()
        metrics.append(record)
        if step % validate_every == 0 or step == num_steps:
            metrics.append(
                {"kind": "validation", "step": step, "validation/loss": record["loss"] + 0.1,
                 "validation/unigram_entropy": 6.5, "validation/bits_per_byte": 1.75}
            )  # fmt: skip
    return metrics


def axes_of(figure: Any) -> dict[str, Any]:
    return {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}


RUNS = {
    "usual": synthetic_run(300),
    "one step": synthetic_run(1),
    "two steps": synthetic_run(2),
    "dense": synthetic_run(120, experts=0),
    "one expert": synthetic_run(5, layers=1, experts=1),
    "deep and wide": synthetic_run(60, layers=48, experts=128),
    "never validated": [r for r in synthetic_run(50) if r["kind"] == "train"],
    "broken routing": [
        {"step": 1, "loss": 2.0, "router/load_LE": [[math.nan, 0.5]]},
        {"step": 2, "loss": 2.0, "router/load_LE": [[0.0, 0.0]]},
        {"step": 3, "loss": 2.0, "router/load_LE": []},
    ],
    "few keys": [{"step": 1, "loss": 2.0}],
    "nothing finite": [
        {"kind": "train", "step": s, "loss": math.nan, "grad_norm": math.inf, "skipped": True}
        for s in range(5)
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_becomes_a_png(name: str, tmp_path: Path) -> None:
    path = run_picture(RUNS[name], title=name, path=tmp_path / "new" / "run.png")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1800, 1110)
    assert [p.name for p in path.parent.iterdir()] == ["run.png"]


@pytest.mark.parametrize("name", RUNS)
def test_titles_legends_and_labels_neither_overlap_nor_leave_the_picture(name: str) -> None:
    with matplotlib.rc_context(STYLE):
        figure = run_figure(RUNS[name], title=name)
        figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        headings = [axes.title, axes._left_title, axes.get_legend()]
        headings += [t for t in axes.texts if t.get_transform() == axes.transAxes]
        shown = [h for h in headings if h is not None and getattr(h, "get_text", lambda: "x")()]
        boxes = [h.get_window_extent(renderer) for h in shown]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other), (shown, boxes)
    title, summary = (text.get_window_extent(renderer) for text in figure.texts)
    assert not title.overlaps(summary)
    box = figure.get_tightbbox(renderer)
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width / figure.dpi
    assert box.y1 <= height / figure.dpi


def test_the_loss_panel_holds_the_losses_and_the_unigram_entropy() -> None:
    metrics = RUNS["usual"]
    axes = axes_of(run_figure(metrics, title="t"))["Loss"]
    drawn = [np.asarray(line.get_ydata(), dtype=float).tolist() for line in axes.lines]
    loss = [r["loss"] for r in metrics if r["kind"] == "train"]
    validation = [r["validation/loss"] for r in metrics if r["kind"] == "validation"]
    assert drawn[0] == loss
    assert drawn[1] == smooth(np.array(loss), width=7).tolist()
    assert drawn[2] == validation
    assert drawn[3] == [6.5, 6.5]
    assert axes.lines[3].get_linestyle() == "--"
    labels = [text.get_text() for text in axes.texts]
    assert "unigram entropy of the validation tokens, 6.500" in labels
    assert f"{validation[-1]:.3f}" in labels


def test_the_map_holds_the_mean_ratio_of_the_last_records_and_marks_the_dead() -> None:
    metrics = synthetic_run(40, layers=3, experts=8)
    for record in metrics:
        if "router/load_LE" in record:
            record["router/load_LE"][1][6] = 0.0
    axes = axes_of(run_figure(metrics, title="t"))["Expert load"]
    last = [r["router/load_LE"] for r in metrics if r["kind"] == "train"][-20:]
    ratio_LE = load_ratio(np.mean(last, axis=0))
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(np.asarray(shown)[~shown.mask], ratio_LE[ratio_LE > 0])
    assert np.argwhere(shown.mask).tolist() == [[1, 6]]
    (crosses,) = axes.lines
    assert crosses.get_xydata().tolist() == [[6.0, 1.0]]
    assert "1 of 24 dead" in axes.texts[-1].get_text()
    norm = axes.images[0].norm
    assert norm(1.0) == 0.5, "the neutral colour is the ideal load"
    assert norm(0.0) == 0.0


def test_the_imbalance_panel_holds_the_worst_and_the_mean_layer() -> None:
    metrics = synthetic_run(10)
    axes = axes_of(run_figure(metrics, title="t"))["Load imbalance"]
    variation = np.array(
        [coefficient_of_variation(r["router/load_LE"]) for r in metrics if r["kind"] == "train"]
    )
    np.testing.assert_allclose(axes.lines[0].get_ydata(), variation.max(axis=1))
    np.testing.assert_allclose(axes.lines[1].get_ydata(), variation.mean(axis=1))


def test_a_dense_run_has_no_panels_about_experts() -> None:
    assert set(axes_of(run_figure(RUNS["dense"], title="t"))) == {
        "Loss", "Learning rate", "Gradient norm",
    }  # fmt: skip


def test_skipped_steps_are_marked() -> None:
    metrics = synthetic_run(50)
    metrics[9] |= {"skipped": True, "loss": math.nan}
    axes = axes_of(run_figure(metrics, title="t"))["Loss"]
    (marks,) = [line for line in axes.lines if line.get_label() == "skipped step (1)"]
    assert list(marks.get_xdata()) == [10]


def test_the_style_of_the_caller_is_left_alone_and_no_window_system_is_loaded(
    tmp_path: Path,
) -> None:
    program = f"""
import sys
from analysis.plots import run_picture
assert "matplotlib" not in sys.modules, "importing the module must not need matplotlib"
import matplotlib
before = {{k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}}
run_picture([{{"step": 1, "loss": 2.0}}], title="t", path={str(tmp_path / "run.png")!r})
assert all(matplotlib.rcParams[k] == value for k, value in before.items())
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_run_without_training_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record of kind 'train'"):
        run_picture([{"kind": "validation", "step": 1}], title="t", path=tmp_path / "run.png")


@pytest.mark.parametrize("width", [1, 2, 3, 7, 50])
def test_smoothing_is_the_mean_of_the_finite_neighbours(width: int) -> None:
    values = np.random.default_rng(0).normal(size=20)
    values[[3, 4, 11]] = [np.nan, np.inf, -np.inf]
    before = width // 2
    after = (width - 1) // 2
    for at, value in enumerate(smooth(values, width=width)):
        near = values[max(0, at - before) : at + after + 1]
        near = near[np.isfinite(near)]
        assert value == pytest.approx(near.mean()) if len(near) else np.isnan(value)
