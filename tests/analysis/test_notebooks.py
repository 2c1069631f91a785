"""The notebooks run on real runs, show what the analysis functions say, and read well in a diff."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import numpy as np
import pyarrow.parquet
import pytest
from jupytext.paired_paths import paired_paths
from matplotlib.image import imread
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from analysis.key_counts import count_by_key
from analysis.learning_curves import arms_table, find_curves
from analysis.token_table import token_table
from moe.trace.batch import join_rows
from moe.trace.read import open_trace

ANALYSIS = Path(__file__).resolve().parents[2] / "analysis"
# name -> the figures that it shows of the runs here
FIGURES = {"expert_utilisation": 8, "routing_dynamics": 4, "dense_and_sparse": 2}
NAMES = tuple(FIGURES)
LIMIT_SECONDS = 60
SYNC = "jupytext --sync analysis/*.ipynb"
# of the page's and the commands' packages, what a notebook may not need
NOT_NEEDED = ("torch", "deepspeed", "hydra", "wandb", "marimo", "plotly")


def load(name: str) -> Any:
    return nbformat.read(ANALYSIS / f"{name}.ipynb", as_version=4)


def code_of(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook: Any, run: str, *, environment: dict[str, str], home: Path) -> Any:
    """Run all cells in a kernel of its own, as Jupyter does, from analysis/; returns notebook."""
    own = {"PHIMOE_RUN": run, "IPYTHONDIR": str(home), "JUPYTER_RUNTIME_DIR": str(home)}
    client = NotebookClient(
        notebook, timeout=LIMIT_SECONDS, resources={"metadata": {"path": str(ANALYSIS)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)  # the client's half of the connection lies there too
        patch.setenv("JUPYTER_CONFIG_DIR", str(home))
        client.execute(env=environment | own, cwd=str(ANALYSIS))
    return notebook


def outputs(notebook: Any, kind: str) -> list[Any]:
    return [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == kind]


def text_of(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook, "stream"))


def add_cell(notebook: Any, source: str) -> None:
    """A last cell whose one line of output is read back as JSON."""
    notebook.cells.append(nbformat.v4.new_code_cell(source))


def told(notebook: Any) -> Any:
    return json.loads(notebook.cells[-1].outputs[-1].text)


@pytest.fixture(scope="session")
def executed(runs: Any, environment: dict[str, str], tmp_path_factory: Any) -> dict[str, Any]:
    """Every notebook after it was run, with what its last, added cell told, and its seconds."""
    done = {}
    for name in NAMES:
        run = f"{runs.sparse}{os.pathsep}{runs.dense}" if "dense" in name else str(runs.sparse)
        notebook = load(name)
        more = "{}"
        if name == "expert_utilisation":
            more = (
                "{'ratio': evenness.ratio.estimate.tolist(), 'trace': str(trace.folder), "
                "'load': counts.routing.load_LE.tolist()}"
            )
        if name == "routing_dynamics":
            more = "{'load': series.load_BLE.tolist(), 'step': series.step_B.tolist()}"
        modules = f"sorted(set({NOT_NEEDED!r}) & set(sys.modules))"
        add_cell(notebook, f"import json, sys; print(json.dumps([{modules}, {more}]))")
        begun = time.monotonic()
        home = tmp_path_factory.mktemp("jupyter")
        execute(notebook, run, environment=environment, home=home)
        done[name] = (notebook, time.monotonic() - begun)
        print(f"{name}: {done[name][1]:.1f} seconds")
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_time_without_an_error_and_every_figure_has_something(
    name: str, executed: dict[str, Any]
) -> None:
    notebook, seconds = executed[name]
    assert seconds < LIMIT_SECONDS
    assert outputs(notebook, "error") == []
    assert [o.text for o in outputs(notebook, "stream") if o.name == "stderr"] == []
    assert told(notebook)[0] == [], "packages that a notebook does not need were imported"
    shown = [o.data for o in outputs(notebook, "display_data")]
    assert all("image/png" in data for data in shown)
    assert len(shown) == FIGURES[name]
    for data in shown:
        pixels = imread(io.BytesIO(base64.b64decode(data["image/png"])))[..., :3]
        colours = np.unique((pixels * 255).astype(int) @ np.array([1, 256, 65536]))
        ink = (pixels < 0.98).any(axis=-1)
        assert len(colours) > 50
        assert ink.mean() > 0.02
        # something below the titles, too, left and right
        lower = ink[ink.shape[0] // 3 :]
        assert lower[:, : ink.shape[1] // 2].any()
        assert lower[:, ink.shape[1] // 2 :].any()


@pytest.mark.slow
def test_the_load_shown_is_that_of_the_trace_counted_row_by_row(
    executed: dict[str, Any], runs: Any
) -> None:
    notebook, _ = executed["expert_utilisation"]
    _, said = told(notebook)
    folder = Path(said["trace"])
    assert folder == runs.sparse / "traces/step_00000060", "the last checkpoint's"
    load = np.zeros((2, 16), int)
    for batch in open_trace(folder).batches(("expert",)):
        for token in batch.expert_TLK.tolist():
            for layer, experts in enumerate(token):
                for expert in experts:
                    load[layer, expert] += 1
    parts = folder.glob("*.parquet")
    num_tokens = sum(pyarrow.parquet.read_metadata(part).num_rows for part in parts)
    assert load.sum() == 2 * 2 * num_tokens
    assert said["load"] == load.tolist()
    np.testing.assert_allclose(said["ratio"], load * 16 / load.sum(axis=1, keepdims=True))


@pytest.mark.slow
def test_the_tokens_listed_are_those_of_the_analysis_function(executed: dict[str, Any]) -> None:
    notebook, _ = executed["expert_utilisation"]
    trace = open_trace(told(notebook)[1]["trace"])
    batch = join_rows(list(trace.batches(("token", "expert"))))
    counts = count_by_key(batch.token_T, batch.expert_TLK, num_keys=512, num_experts=16)
    table = token_table(counts, trace.vocabulary(), layer=0, min_count=20)
    assert table in text_of(notebook)
    assert "expert   0: '" in table


@pytest.mark.slow
def test_the_curves_of_training_are_means_of_what_the_log_says(
    executed: dict[str, Any], runs: Any
) -> None:
    _, said = told(executed["routing_dynamics"][0])
    lines = (runs.sparse / "metrics.jsonl").read_text().splitlines()
    load = [r["router/load_LE"] for r in map(json.loads, lines) if "router/load_LE" in r]
    assert len(load) == 60
    assert said["step"] == list(range(1, 61)), "60 points of 60 steps"
    np.testing.assert_allclose(said["load"], load)


@pytest.mark.slow
def test_the_losses_in_the_table_are_those_that_the_runs_ended_with(
    executed: dict[str, Any], runs: Any
) -> None:
    text = text_of(executed["dense_and_sparse"][0])
    variable = {"PHIMOE_RUN": f"{runs.sparse}{os.pathsep}{runs.dense}"}
    curves, _ = find_curves(environment=variable)
    assert arms_table(curves) in text
    for folder in (runs.sparse, runs.dense):
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        last = [r["validation/loss"] for r in records if "validation/loss" in r][-1]
        assert f"{last:.4f}" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert_utilisation", "routing_dynamics"])
def test_a_dense_run_gets_one_message_and_no_traceback(
    name: str, runs: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    notebook = load(name)
    with pytest.raises(CellExecutionError):
        execute(notebook, str(runs.dense), environment=environment, home=tmp_path)
    (error,) = outputs(notebook, "error")
    (line,) = error.traceback
    assert re.fullmatch(r"DataError: run: .* which is dense: it has no experts.*", line)
    assert not outputs(notebook, "display_data")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_and_stores_nothing_of_a_session(name: str) -> None:
    notebook = load(name)
    assert len(notebook.cells) <= 15
    nbformat.validate(notebook)
    for number, cell in enumerate(notebook.cells):
        assert cell.metadata == {}
        assert cell.id == f"cell-{number:02d}", "an id of its place differs in no diff"
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert notebook.metadata == {
        "jupytext": {
            "formats": "ipynb,notebooks//py:percent",
            "notebook_metadata_filter": "-jupytext.text_representation.jupytext_version",
        },
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


@pytest.mark.parametrize("name", NAMES)
def test_cells_call_the_analysis_and_decide_nothing(name: str) -> None:
    allowed = (ast.ImportFrom, ast.Assign, ast.Expr)
    forbidden = (ast.Lambda, ast.comprehension, ast.IfExp, ast.BinOp, ast.Subscript)
    for source in code_of(load(name)):
        tree = ast.parse(source)
        assert all(isinstance(node, allowed) for node in tree.body), source
        assert not [node for node in ast.walk(tree) if isinstance(node, forbidden)], source
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] == "analysis", source
    first = code_of(load(name))[0]
    assert re.search(r"^RUNS? = (None|\{\})  # ", first, re.MULTILINE), "parameters come first"


@pytest.mark.parametrize("name", NAMES)
def test_every_code_cell_has_prose_before_it_and_its_links_lead_to_what_they_name(
    name: str,
) -> None:
    cells = load(name).cells
    links = []
    for before, cell in pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
    for cell in cells:
        if cell.cell_type == "markdown":
            links += re.findall(r"\[(\w+)\]\(([^)]+)\)", cell.source)
    assert links
    for what, path in links:
        target = (ANALYSIS / path).resolve()
        assert target.is_file(), path
        names = {
            node.name
            for node in ast.walk(ast.parse(target.read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert what == target.stem or what in names, f"{path} has no {what}"


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_of_a_notebook_says_the_same(name: str) -> None:
    notebook = load(name)
    formats = notebook.metadata["jupytext"]["formats"]
    paths = [path for path, _ in paired_paths(f"analysis/{name}.ipynb", "ipynb", formats)]
    assert paths == [f"analysis/{name}.ipynb", f"analysis/notebooks/{name}.py"]
    pair = jupytext.read(ANALYSIS / "notebooks" / f"{name}.py")
    here = [(cell.cell_type, cell.source) for cell in notebook.cells]
    there = [(cell.cell_type, cell.source) for cell in pair.cells]
    assert here == there, f"{paths[0]} and {paths[1]} differ; keep the newer one and run: {SYNC}"
    # what jupytext would write of the notebook, to the byte: a sync then changes nothing
    written = jupytext.writes(notebook, fmt="py:percent")
    assert written == (ANALYSIS / "notebooks" / f"{name}.py").read_text(), f"run: {SYNC}"


def test_every_notebook_there_is_tested() -> None:
    assert {path.stem for path in ANALYSIS.glob("*.ipynb")} == set(NAMES)
    assert {path.stem for path in (ANALYSIS / "notebooks").glob("*.py")} == set(NAMES)


def test_the_notebooks_modules_import_without_torch() -> None:
    modules = [
        f"analysis.{name}"
        for name in ("notebook", "open_run", "over_steps", "learning_curves", "figure_learning",
                     "figure_steps", "figure_trace", "token_table")
    ]  # fmt: skip
    assert all(importlib.util.find_spec(module) for module in modules)
    code = (
        f"import sys, {', '.join(modules)}; print(sorted({set(NOT_NEEDED)!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
        cwd=ANALYSIS.parent, env={**os.environ, "PYTHONPATH": str(ANALYSIS.parent)},
    )  # fmt: skip
    assert done.stdout == "[]\n"
