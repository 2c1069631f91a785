"""From finished runs to the files of a report: two CSV files, then text and figure made of them."""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison_plan import PlannedRun
from comparison_pool import read_record

from analysis.compare_runs import difference, read_rows
from analysis.comparison_figure import comparison_figure
from analysis.comparison_report import FIGURE_NAME, conclusion, report
from analysis.utilisation import coefficient_of_variation, dead_experts
from moe.compare_config import CompareConfig
from moe.errors import DataError
from moe.train.atomic_files import replace_file
from moe.train.metrics import METRICS_FILE, Record, read_metrics
from moe.train.redact import redact_texts

RUNS_NAME, CURVES_NAME, REPORT_NAME = "runs.csv", "curves.csv", "report.md"
_LAST_RECORDS = 20  # the load is that of the last so many steps, one batch alone is noisy


def write_numbers(runs: Sequence[PlannedRun], folder: Path, *, common_overrides: str = "") -> None:
    """Write both files; DataError where the runs were trained on different data."""
    fingerprints = {read_record(run)["data_fingerprint"] for run in runs}
    if len(fingerprints) > 1:
        raise DataError(
            f"paths.runs: the runs in {runs[0].folder.parents[1]} were trained on "
            f"{len(fingerprints)} different preparations of {runs[0].config.paths.data_dir}, so "
            "their losses cannot be compared. Move the older ones away: they are made again."
        )
    typed = shlex.split(common_overrides)
    shown = redact_texts(typed, os.environ)
    common = common_overrides if shown == typed else shlex.join(shown)
    rows, curves = [], []
    for run in runs:
        metrics = read_metrics(run.folder / METRICS_FILE)
        rows.append(_row(run, metrics) | {"common_overrides": common})
        curves += _curve(run, metrics)
    _write(folder / RUNS_NAME, rows)
    _write(folder / CURVES_NAME, curves)


def write_report(config: CompareConfig, folder: Path) -> list[str]:
    """Write report and figure from the folder's CSV files; what they say, a line a contrast."""
    rows = read_rows(folder / RUNS_NAME)
    text = report(config, rows)
    picture = io.BytesIO()
    comparison_figure(config, rows, read_rows(folder / CURVES_NAME)).savefig(picture, format="png")
    replace_file(folder / FIGURE_NAME, picture.getvalue())
    replace_file(folder / REPORT_NAME, text.encode())
    return [
        conclusion(config, c, difference(rows, c.arm, against=c.against)) for c in config.contrasts
    ]


def _row(run: PlannedRun, metrics: list[Record]) -> dict[str, Any]:
    training = [record for record in metrics if record["kind"] == "train"]
    last = [record for record in metrics if record["kind"] == "validation"][-1]
    record, model = read_record(run), run.config.model
    row: dict[str, Any] = {
        "arm": run.arm,
        "seed": run.seed,
        "validation_loss": last["validation/loss"],
        "bits_per_byte": last["validation/bits_per_byte"],
        "unigram_entropy": last["validation/unigram_entropy"],
        "validation_tokens": int(last["validation/tokens"]),
    }
    for key in sorted(last):
        for measure, column in (("loss", "loss"), ("bits_per_byte", "bits_per_byte")):
            domain = key.removeprefix(f"validation/{measure}/")
            if domain != key:
                row[f"{column}/{domain}"] = last[key]
    row |= {
        "training_loss": float(np.mean([r["loss"] for r in training[-_LAST_RECORDS:]])),
        "skipped_steps": sum(bool(r["skipped"]) for r in training),
    }
    row |= _balance([r["router/load_LE"] for r in training[-_LAST_RECORDS:] if _is_routed(r)])
    return row | {
        "steps": run.config.train.steps,
        "tokens": run.tokens,
        "labels": training[-1]["tokens_seen"],
        "flops": f"{run.flops:.6g}",
        "total_tokens": run.total_tokens,
        "total_flops": f"{run.total_flops:.6g}",
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters(active=True),
        "training_seconds": round(sum(r["step_seconds"] for r in training), 1),
        "model": model.name,
        "key": run.key,
        "commit": " ".join(record["commits"]),
        "cpu": record["machine"]["cpu"],
        "cores": record["machine"]["cores"],
        "torch": record["machine"]["torch"],
        "date": record["machine"]["date"],
        "data": record["data_fingerprint"][:12],
        "starts_from": run.starts_from.arm if run.starts_from else "",
        "overrides": " ".join(redact_texts(run.overrides, os.environ)),
    }


def _is_routed(record: Record) -> bool:
    return bool(record.get("router/load_LE"))


def _balance(loads: list[list[list[float]]]) -> dict[str, Any]:
    """Mean over the layers of the load's deviation over its mean, and experts without a token."""
    if not loads:
        return {"load_cv": "", "dead_experts": ""}
    load_LE = np.asarray(loads, dtype=np.float64).mean(axis=0)
    return {
        "load_cv": float(coefficient_of_variation(load_LE).mean()),
        "dead_experts": int(dead_experts(load_LE).sum()),
    }


def _curve(run: PlannedRun, metrics: list[Record]) -> list[dict[str, Any]]:
    """A row for each evaluation; tokens and FLOPs with those of the run that it starts from."""
    before, steps = run.starts_from, run.config.train.steps
    points = []
    for record in metrics:
        if record["kind"] != "validation":
            continue
        share = record["step"] / steps
        tokens = run.tokens * share + (before.total_tokens if before else 0)
        flops = run.flops * share + (before.total_flops if before else 0.0)
        points.append(
            {
                "arm": run.arm,
                "seed": run.seed,
                "step": record["step"],
                "total_tokens": round(tokens),
                "total_flops": f"{flops:.6g}",
                "validation_loss": record["validation/loss"],
            }
        )
    return points


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A column for every key of any row, in the order in which they first come."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(_short(rows))
    replace_file(path, text.getvalue().encode())


def _short(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Seven digits of a float are more than a run repeats on another machine."""
    for row in rows:
        yield {k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()}
