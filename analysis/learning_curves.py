"""How the validation loss of several runs fell, from a report's CSV files or from run folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.compare_runs import Row, read_rows
from analysis.open_run import RUN_VARIABLE, RunFiles, find_run_folder, open_run
from analysis.utilisation import coefficient_of_variation
from moe.errors import DataError

Floats = NDArray[np.float64]

RUNS_NAME, CURVES_NAME = "runs.csv", "curves.csv"
REPORT = Path(__file__).parent / "reports" / "dense_and_sparse"
_HOW = (
    "Make the report with `python launch/compare.py comparison=dense_and_sparse`, or set RUNS in "
    "the first cell to two run folders of the same data."
)
_LAST_RECORDS = 20  # the load is that of the last so many steps: one batch alone is noisy


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """One run: P evaluations, and what the last of them and the model say."""

    arm: str  # runs of an arm differ by their seed alone
    seed: int
    tokens_P: Floats  # trained on so far
    flops_P: Floats  # of training so far; of a run folder, an estimate
    loss_P: Floats  # nats per token of the validation text
    loss_by_domain: Mapping[str, float] = field(default_factory=dict)  # the last evaluation's
    parameters: int = 0
    active_parameters: int = 0  # those that a token uses
    load_variation: float | None = None  # mean of the layers; None for a dense model
    unigram_entropy: float | None = None  # of the validation tokens; None where it is not said

    @property
    def last_loss(self) -> float:
        """Validation loss at the end."""
        return float(self.loss_P[-1])


def find_curves(
    runs: Mapping[str, str | Path] | None = None, *, report: str | Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> tuple[list[LearningCurve], str]:  # fmt: skip
    """The runs given by name, else the folders in PHIMOE_RUN, else a report; and where from.

    PHIMOE_RUN holds two or more folders as PATH does, and their models name them. The report is
    analysis/reports/dense_and_sparse unless another is given. Raises DataError where there is none.
    """
    folders = [folder for folder in environment.get(RUN_VARIABLE, "").split(os.pathsep) if folder]
    if runs:
        curves = [curve_of_run(_opened(folder), arm=name) for name, folder in runs.items()]
        return _two_or_more(curves), ", ".join(map(str, runs.values()))
    if folders and report is None:
        opened = [_opened(folder) for folder in folders]
        curves = [curve_of_run(run, arm=_distinct(run, opened)) for run in opened]
        return _two_or_more(curves), ", ".join(folders)
    folder = Path(report) if report else REPORT
    return _two_or_more(read_report(folder)), str(folder)


def curve_of_run(run: RunFiles, *, arm: str) -> LearningCurve:
    """The curve of a run folder; FLOPs are 6 for each active parameter beyond the embedding.

    6 N a token is forward and backward without attention's own products (Kaplan et al. 2020, arXiv
    2001.08361, section 2.1): the reports count these too. Raises DataError without an evaluation.
    """
    train = {r["step"]: r for r in run.metrics if r.get("kind") == "train"}
    evaluated = [
        r for r in run.metrics if "validation/loss" in r and (r["step"] in train or not r["step"])
    ]
    if not evaluated:
        raise DataError(
            f"{run.folder}: its metrics have no validation loss. Train with train.evaluate_every "
            "above 0, or wait for the first evaluation."
        )
    last, model = evaluated[-1], run.model
    tokens_P = np.array([train[r["step"]]["tokens_seen"] if r["step"] else 0 for r in evaluated])
    used = model.num_parameters(active=True) - model.parameter_table()["embedding"]
    prefix = "validation/loss/"
    loads = [r["router/load_LE"] for r in train.values() if r.get("router/load_LE")]
    return LearningCurve(
        arm=arm,
        seed=0,
        tokens_P=tokens_P.astype(np.float64),
        flops_P=6.0 * used * tokens_P,
        loss_P=np.array([r["validation/loss"] for r in evaluated], dtype=np.float64),
        loss_by_domain={
            key.removeprefix(prefix): float(last[key]) for key in last if key.startswith(prefix)
        },
        parameters=model.num_parameters(),
        active_parameters=model.num_parameters(active=True),
        load_variation=_variation(loads[-_LAST_RECORDS:]),
        unigram_entropy=last.get("validation/unigram_entropy"),
    )


def read_report(folder: str | Path) -> list[LearningCurve]:
    """The curves of a report of launch/compare.py. Raises DataError naming the file and line."""
    folder = Path(folder)
    rows = _rows(folder / RUNS_NAME)
    points: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    path = folder / CURVES_NAME
    for number, row in enumerate(_rows(path), start=2):
        key = row.get("arm", ""), int(_number(row, "seed", path, number))
        columns = ("total_tokens", "total_flops", "validation_loss")
        tokens, flops, loss = (_number(row, name, path, number) for name in columns)
        points.setdefault(key, []).append((tokens, flops, loss))
    curves = []
    for number, row in enumerate(rows, start=2):
        path = folder / RUNS_NAME
        key = row.get("arm", ""), int(_number(row, "seed", path, number))
        if key not in points:
            raise DataError(f"{path}: line {number}: {key} has no row in {CURVES_NAME}. {_HOW}")
        tokens_P, flops_P, loss_P = np.array(sorted(points[key])).T
        curves.append(
            LearningCurve(
                *key, tokens_P, flops_P, loss_P,
                loss_by_domain={
                    name.removeprefix("loss/"): _number(row, name, path, number)
                    for name in row if name.startswith("loss/")
                },
                parameters=int(_number(row, "parameters", path, number)),
                active_parameters=int(_number(row, "active_parameters", path, number)),
                load_variation=float(row["load_cv"]) if row.get("load_cv") else None,
                unigram_entropy=_number(row, "unigram_entropy", path, number),
            )
        )  # fmt: skip
    return curves


def by_arm(curves: Sequence[LearningCurve]) -> dict[str, list[LearningCurve]]:
    """The runs of each arm by seed; arms in the order in which they first come."""
    arms: dict[str, list[LearningCurve]] = {}
    for curve in curves:
        arms.setdefault(curve.arm, []).append(curve)
    return {arm: sorted(of_arm, key=lambda curve: curve.seed) for arm, of_arm in arms.items()}


def arms_table(curves: Sequence[LearningCurve]) -> str:
    """A line for each arm: sizes, what training cost, and the last validation loss of its seeds."""
    head: tuple[str, ...] = (
        "arm",
        "runs",
        "parameters",
        "active",
        "tokens",
        "FLOPs",
        "load CV",
        "last loss",
    )
    lines: list[tuple[str, ...]] = [head]
    for arm, of_arm in by_arm(curves).items():
        one = of_arm[0]
        loss = [curve.last_loss for curve in of_arm]
        seeds = "" if len(loss) == 1 else f" ({min(loss):.4f} to {max(loss):.4f})"
        variation = [c.load_variation for c in of_arm if c.load_variation is not None]
        lines.append(
            (
                arm, str(len(of_arm)), f"{one.parameters:,}", f"{one.active_parameters:,}",
                f"{one.tokens_P[-1]:,.0f}", f"{one.flops_P[-1]:.2e}",
                f"{np.mean(variation):.2f}" if variation else "-", f"{np.mean(loss):.4f}{seeds}",
            )
        )  # fmt: skip
    width = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            text.ljust(size) if column in (0, len(head) - 1) else text.rjust(size)
            for column, (text, size) in enumerate(zip(line, width, strict=True))
        ).rstrip()
        for line in lines
    )


def _opened(folder: str | Path) -> RunFiles:
    return open_run(find_run_folder(folder))


def _distinct(run: RunFiles, runs: Sequence[RunFiles]) -> str:
    same = sum(other.model.name == run.model.name for other in runs)
    return run.model.name if same == 1 else f"{run.model.name} {run.folder.name}"


def _two_or_more(curves: list[LearningCurve]) -> list[LearningCurve]:
    if len({curve.arm for curve in curves}) < 2:
        raise DataError(f"RUNS: got {len(curves)} run(s) to compare; give two or more. {_HOW}")
    first = curves[0]
    for curve in curves[1:]:
        if not np.isclose(
            curve.unigram_entropy or 0.0, first.unigram_entropy or 0.0, rtol=1e-6, atol=0.0
        ):
            raise DataError(
                f"RUNS: {curve.arm} was evaluated on other tokens than {first.arm} (unigram "
                f"entropies {curve.unigram_entropy} and {first.unigram_entropy}), so that their "
                "losses do not compare. Give runs of the same data, tokenizer and evaluation."
            )
    return curves


def _variation(loads: Sequence[object]) -> float | None:
    if not loads:
        return None
    return float(coefficient_of_variation(np.mean(loads, axis=0)).mean())  # type: ignore[arg-type]


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"report: there is no {path}. {_HOW}")
    return read_rows(path)


def _number(row: Row, name: str, path: Path, line: int) -> float:
    try:
        return float(row[name])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{path}: line {line}: {name} is {row.get(name)!r}; it must be a number. {_HOW}"
        ) from None
