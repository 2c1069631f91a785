"""The lines at the end of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "launch" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_load_line_counts_experts_of_the_last_records_only():
    records = [{"kind": "train", "router/load_LE": [[1.0, 0.0, 0.0, 0.0]]}] * 30
    records += [{"kind": "train", "router/load_LE": [[0.5, 0.3, 0.2, 0.0]]}] * 20
    records += [{"kind": "validation", "validation/loss": 1.0}]
    (line,) = tables().load_line(records)
    assert line == (
        "experts: 3 of 4 received tokens in the last 20 steps; "
        "the busiest 2.00, the idlest 0.00 times an equal share"
    )


def test_a_dense_run_has_no_load_line():
    assert tables().load_line([{"kind": "train", "loss": 1.0}]) == []
