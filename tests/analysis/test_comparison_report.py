"""A report says what its numbers say, in words as weak as its intervals; its figure shows them."""

from __future__ import annotations

import dataclasses
import re

import pytest

from analysis.compare_runs import Row
from analysis.comparison_figure import arm_look, comparison_figure
from analysis.comparison_report import report
from analysis.figure_frame import GREY
from moe.compare_config import ArmConfig, CompareConfig, ContrastConfig
from moe.errors import DataError

CONFIG = CompareConfig(
    name="small",
    experiment="nano",
    title="One router against another",
    question="Which is better?",
    published="One is.",
    source="a paper",
    arms=(
        ArmConfig("one", label="router one"),
        ArmConfig("two"),
        ArmConfig("dense", label="a dense model of which nothing is published"),
    ),
    contrasts=(
        ContrastConfig("one", against="two", expects="lower"),
        ContrastConfig("one", against="dense"),
    ),
    limits=("It is small.",),
)


def rows_of(one: list[float], two: list[float], dense: list[float]) -> list[Row]:
    """One row a run, as launch/compare.py writes them; the dense arm has no experts."""
    fixed = {
        "bits_per_byte": "2.0", "unigram_entropy": "5.8", "validation_tokens": "60000",
        "parameters": "5650176", "active_parameters": "1349376", "total_tokens": "1228800",
        "total_flops": "8.9e12", "training_seconds": "120", "skipped_steps": "0",
        "commit": "0123abcd", "cpu": "a CPU", "cores": "2", "torch": "2.13.0", "data": "d8bc",
        "common_overrides": "",
    }  # fmt: skip
    return [
        {"arm": arm, "seed": str(seed), "validation_loss": str(loss), "loss/code": str(loss - 0.5)}
        | fixed
        | ({} if arm == "dense" else {"load_cv": "0.25", "dead_experts": "1"})
        for arm, losses in (("one", one), ("two", two), ("dense", dense))
        for seed, loss in enumerate(losses)
    ]


def curves_of(rows: list[Row], *, flops: dict[str, float] | None = None) -> list[Row]:
    return [
        {
            "arm": row["arm"], "seed": row["seed"], "step": str(step),
            "total_tokens": str(2048 * step),
            "total_flops": str(step * (flops or {}).get(row["arm"], 1e10)),
            "validation_loss": str(float(row["validation_loss"]) + 600 / step - 1),
        }
        for row in rows for step in (200, 400, 600)
    ]  # fmt: skip


SEEN = rows_of([4.00, 4.10, 4.20], [4.10, 4.21, 4.29], [4.0, 4.3, 4.1])


def said(rows: list[Row], config: CompareConfig = CONFIG) -> list[str]:
    """The two sentences below "What these runs say"."""
    text = report(config, rows)
    return [line[2:] for line in text.partition("runs say\n\n")[2].splitlines()[:2]]


def test_a_difference_whose_interval_excludes_zero_is_said_to_be_seen() -> None:
    first, second = said(SEEN)
    assert first == (
        "router one against two (published direction: lower): **Seen at this scale.** The loss is "
        "lower by 0.1000 nats per token (95 % interval of the difference -0.1248 to -0.0752, "
        "3 seeds)."
    )
    assert "**Not resolved.** The mean difference is -0.0333" in second
    assert "published direction" not in second


def test_a_difference_against_the_published_direction_is_said_to_be_one() -> None:
    rows = rows_of([4.10, 4.21, 4.29], [4.00, 4.10, 4.20], [4.5, 4.6, 4.7])
    first, second = said(rows)
    assert "**The opposite is seen at this scale.** The loss is higher by 0.1000" in first
    assert "**A difference is seen at this scale.** The loss is lower by 0.4000" in second


def test_an_interval_that_holds_zero_is_never_called_a_difference() -> None:
    first, _ = said(rows_of([4.0, 4.3, 4.1], [4.1, 4.2, 4.2], [4.0, 4.0, 4.0]))
    assert "**Not resolved.**" in first
    assert "its interval holds 0" in first
    assert "a difference below about 0.2868 cannot be told from none" in first
    assert not re.search("lower by|higher by|is seen", first)


def test_one_seed_says_nothing() -> None:
    text = report(CONFIG, rows_of([4.0], [4.2], [4.3]))
    assert "One seed gives a difference of -0.2000 and no interval." in text
    assert "Seed 0 alone, so without intervals." in text
    assert "seeds=[0]" in text
    assert "±" not in text


def test_a_seed_that_is_missing_is_named_among_the_limits() -> None:
    text = report(CONFIG, rows_of([4.0, 4.1, 4.2], [4.2, 4.3], [4.1, 4.1, 4.3]))
    assert "Of 3 seeds asked for, two has 2." in text
    assert "two has" not in report(CONFIG, SEEN)


def test_the_table_has_what_the_rows_have() -> None:
    text = report(CONFIG, SEEN)
    line = next(line for line in text.splitlines() if line.startswith("| router one | 4.1"))
    assert line.split(" | ")[1:8] == [
        "4.1000 ± 0.2484", "2.0000 ± 0.0000", "0.25", "1.0", "5.65 M", "1.35 M", "1.23 M",
    ]  # fmt: skip
    assert "load CV" in text
    assert "60,000 held-out tokens, whose unigram entropy is 5.800 nats" in text
    assert "- commit of the runs: 0123abcd\n" in text
    assert "About 0.22 tokens a parameter" in text
    assert "- It is small." in text
    assert "the mean ± 2.48 standard deviations" in text
    assert "| router one | 3.6000 |" in text  # the domain's
    dense = [row | {"load_cv": "", "dead_experts": ""} for row in SEEN]
    assert "load CV" not in report(CONFIG, dense)


def test_changes_that_were_not_committed_are_marked_and_explained() -> None:
    rows = [row | {"commit": "0123abcd+ 4567abcd"} for row in SEEN]
    assert "0123abcd+, 4567abcd (a `+` marks" in report(CONFIG, rows)


def test_the_command_is_that_of_the_runs() -> None:
    rows = [row | {"common_overrides": "train.steps=6"} for row in SEEN]
    assert "comparison=small overrides='train.steps=6'`" in report(CONFIG, rows)


def test_an_arm_without_runs_is_refused() -> None:
    with pytest.raises(DataError, match=r"arms one .* and two .*no seed in common"):
        report(CONFIG, [row for row in SEEN if row["arm"] != "two"])


def test_the_figure_has_every_seed_and_greys_what_is_not_resolved() -> None:
    figure = comparison_figure(CONFIG, SEEN, curves_of(SEEN))
    tokens, distances, losses, differences = figure.axes
    dots = [line for line in losses.lines if line.get_marker() == "o"]
    assert [sorted(line.get_xdata()) for line in dots] == [
        [4.00, 4.10, 4.20], [4.10, 4.21, 4.29], [4.0, 4.1, 4.3],
    ]  # fmt: skip
    colours = [line.get_color() for line in differences.lines if line.get_marker() == "o"]
    assert colours[0] != GREY
    assert colours[1] == GREY
    assert distances.get_title(loc="left") == "Less the loss of router one, seed by seed"
    first = tokens.lines[0]
    assert list(first.get_xdata()) == [409600, 819200, 1228800]
    assert list(first.get_ydata()) == pytest.approx([6.1, 4.6, 4.1])


def test_arms_of_other_costs_are_drawn_against_flops_too() -> None:
    figure = comparison_figure(CONFIG, SEEN, curves_of(SEEN, flops={"dense": 4e10}))
    assert figure.axes[1].get_title(loc="left") == "Against FLOPs"


def test_no_text_leaves_the_figure_and_no_two_arms_look_alike() -> None:
    arms = tuple(ArmConfig(f"arm_{i}", label=f"a rather long name of arm {i}") for i in range(9))
    contrasts = tuple(ContrastConfig(arm.name, against="arm_0") for arm in arms[1:])
    config = dataclasses.replace(CONFIG, arms=arms, contrasts=contrasts)
    rows = [row | {"arm": arm.name} for arm in arms for row in SEEN if row["arm"] == "one"]
    figure = comparison_figure(config, rows, curves_of(rows))
    width, height = figure.get_size_inches() * figure.dpi
    for axes in figure.axes:
        box = axes.get_tightbbox()  # with its names, title and ticks
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    looks = {str(sorted(arm_look(config, arm.name).items())) for arm in arms}
    assert len(looks) == len(arms)
