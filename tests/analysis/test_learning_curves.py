"""Curves of run folders and of a report hold the numbers that were written."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.figure_learning import end_figures
from analysis.learning_curves import (
    LearningCurve,
    arms_table,
    by_arm,
    curve_of_run,
    find_curves,
    read_report,
)
from analysis.open_run import open_run
from moe.errors import DataError

RUN_ROW: dict[str, Any] = {
    "validation_loss": 3.0, "bits_per_byte": 1.5, "unigram_entropy": 5.0, "loss/code": 2.5,
    "loss/prose": 3.5, "load_cv": "", "total_flops": 6e9, "parameters": 2000,
    "active_parameters": 1000,
}  # fmt: skip


def write_report(folder: Path, arms: dict[str, float], *, seeds: int = 3, **changed: Any) -> Path:
    """Two evaluations a run; the last loss of seed s is the arm's plus 0.01 s."""
    folder.mkdir(exist_ok=True)
    rows, points = [], []
    for arm, loss in arms.items():
        for seed in range(seeds):
            last = loss + 0.01 * seed
            rows.append({"arm": arm, "seed": seed, **RUN_ROW, "validation_loss": last, **changed})
            for step, value in ((2, last), (1, last + 1)):  # in no order
                points.append(
                    {
                        "arm": arm, "seed": seed, "step": step, "total_tokens": 1000 * step,
                        "total_flops": f"{6e6 * step:g}", "validation_loss": value,
                    }
                )  # fmt: skip
    for name, table in (("runs.csv", rows), ("curves.csv", points)):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return folder


def test_a_reports_curves_are_its_rows_by_step(tmp_path: Path) -> None:
    curves = read_report(write_report(tmp_path / "report", {"moe": 3.0, "dense": 3.2}))
    assert [(c.arm, c.seed) for c in curves] == [(a, s) for a in ("moe", "dense") for s in range(3)]
    one = curves[4]
    assert one.tokens_P.tolist() == [1000, 2000]
    assert one.flops_P.tolist() == [6e6, 12e6]
    np.testing.assert_allclose(one.loss_P, [4.21, 3.21])
    assert one.loss_by_domain == {"code": 2.5, "prose": 3.5}
    assert (one.parameters, one.active_parameters, one.load_variation) == (2000, 1000, None)


def test_a_run_folders_curve_is_its_log(runs: Any) -> None:
    run = open_run(runs.sparse)
    curve = curve_of_run(run, arm="moe")
    records = [json.loads(s) for s in (runs.sparse / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["validation/loss"] for r in records if "validation/loss" in r}
    assert curve.loss_P.tolist() == list(losses.values())
    seen = {r["step"]: r["tokens_seen"] for r in records if r["kind"] == "train"}
    assert curve.tokens_P.tolist() == [seen.get(step, 0) for step in losses]
    model = run.model
    used = model.num_parameters(active=True) - model.vocab_size * model.hidden_size
    assert curve.flops_P[-1] == 6 * used * seen[60]
    assert sorted(curve.loss_by_domain) == ["code", "more"]
    assert curve.load_variation is not None
    assert curve_of_run(open_run(runs.dense), arm="dense").load_variation is None


def test_runs_given_come_first_then_the_variable_then_the_report(runs: Any, tmp_path: Path) -> None:
    both = {"sparse": runs.sparse, "dense": runs.dense}
    variable = {"PHIMOE_RUN": f"{runs.dense}{os.pathsep}{runs.sparse}"}
    assert [c.arm for c in find_curves(both, environment=variable)[0]] == ["sparse", "dense"]
    curves, said = find_curves(environment=variable)
    assert [c.arm for c in curves] == ["nano_dense", "nano_moe"]
    assert said == f"{runs.dense}, {runs.sparse}"
    report = write_report(tmp_path / "report", {"moe": 3.0, "dense": 3.2})
    assert len(find_curves(report=report, environment=variable)[0]) == 6


def test_two_runs_of_one_model_have_names_of_their_own(runs: Any) -> None:
    variable = {"PHIMOE_RUN": f"{runs.sparse}{os.pathsep}{runs.sparse}"}
    with pytest.raises(DataError, match="to compare; give two or more"):
        find_curves(environment=variable)  # the same folder twice


def test_the_table_has_a_line_an_arm_with_its_mean_and_range(tmp_path: Path) -> None:
    report = write_report(tmp_path / "report", {"moe": 3.0, "dense": 3.2})
    head, moe, dense = arms_table(read_report(report)).splitlines()
    assert head.split()[:5] == ["arm", "runs", "parameters", "active", "tokens"]
    assert moe.split() == [
        "moe", "3", "2,000", "1,000", "2,000", "1.20e+07", "-", "3.0100", "(3.0000", "to", "3.0200)"
    ]  # fmt: skip
    assert dense.split()[7] == "3.2100"


def test_differences_are_of_the_same_seed_with_the_t_interval_worked_by_hand() -> None:
    def curve(arm: str, seed: int, loss: float) -> LearningCurve:
        return LearningCurve(arm, seed, np.array([1.0]), np.array([1.0]), np.array([loss]))

    one = [curve("one", seed, loss) for seed, loss in enumerate((3.0, 3.5, 4.0))]
    two = [curve("two", seed, loss) for seed, loss in enumerate((3.1, 3.5, 4.2))]
    final, difference = end_figures([*one, *reversed(two)])
    axes = difference.axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0.1, 0.0, 0.2])
    # mean 0.1, deviation 0.1, t of two degrees 4.3027, over the root of 3
    half = 4.3027 * 0.1 / np.sqrt(3)
    np.testing.assert_allclose(axes.lines[1].get_xdata(), [0.1 - half, 0.1 + half], rtol=1e-4)
    widths = [np.ptp(axes.get_xlim()) for axes in final.axes]
    np.testing.assert_allclose(widths, widths[0])


def test_one_run_of_each_shows_no_interval() -> None:
    curves = [
        LearningCurve(arm, 0, np.ones(1), np.ones(1), np.array([loss]))
        for arm, loss in (("one", 3.0), ("two", 3.001))
    ]
    (figure,) = end_figures(curves)
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [1, 1]
    assert np.ptp(figure.axes[0].get_xlim()) > 0.099, "a thousandth is not made to look like much"
    assert list(by_arm(curves)) == ["one", "two"]


def test_what_cannot_be_compared_is_said(runs: Any, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"report: there is no .*compare.py comparison=dense_and_sp"
    ):
        find_curves(report=tmp_path / "nothing", environment={})
    with pytest.raises(DataError, match="got 1 run"):
        find_curves({"a": runs.sparse}, environment={})
    with pytest.raises(DataError, match=r"RUN: .* does not exist"):
        find_curves({"a": tmp_path / "none", "b": runs.sparse}, environment={})
    other = write_report(tmp_path / "report", {"a": 3.0, "b": 3.1})
    lines = (other / "runs.csv").read_text().splitlines()
    lines[-1] = lines[-1].replace(",5.0,", ",5.5,")
    (other / "runs.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="b was evaluated on other tokens than a"):
        find_curves(report=other, environment={})
    damaged = write_report(tmp_path / "damaged", {"a": 3.0, "b": 3.1}, active_parameters="many")
    with pytest.raises(DataError, match=r"runs.csv: line 2: active_parameters is 'many'"):
        find_curves(report=damaged, environment={})


def test_a_run_without_an_evaluation_is_named(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((runs.sparse / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "tokens_seen": 5}\n')
    with pytest.raises(DataError, match=r"no validation loss. Train with train.evaluate_every"):
        curve_of_run(open_run(tmp_path), arm="a")
