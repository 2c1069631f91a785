"""Which folder is what, what of a log is kept, and what is said where there is nothing to show."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_trace import random_batch, write_trace

from analysis.explore.curves import curves_of
from analysis.explore.figures import curve_figure, map_figure
from analysis.explore.maps import LOAD, LOG, Side, map_of, scale_of, sources_of, steps_of
from analysis.explore.page_file import PageFile, SideFiles, open_page, open_side, save_page
from analysis.explore.run_log import open_log, read_log, save_log
from analysis.explore.sources import find_source
from analysis.utilisation import coefficient_of_variation, load_ratio
from moe.errors import ConfigError, DataError
from moe.trace.batch import Layout
from moe.trace.info import TRACE_NAME, read_info, write_info

LAYOUT = Layout(3, 8, 2, has_logits=False, has_steps=False)


def record(step: int, **more: Any) -> dict[str, Any]:
    load = np.random.default_rng(step).random((2, 4))
    load[0, 1] = 0
    load /= load.sum(axis=1, keepdims=True)
    return {"step": step, "kind": "train", "loss": 7 - step / 10, "loss/balance": 2.0,
            "router/load_LE": load.tolist(), "router/entropy_L": [1.0, 1.2],
            "router/dead_experts": 1} | more  # fmt: skip


def run_folder(folder: Path, records: list[dict[str, Any]], *, experts: int = 4) -> Path:
    folder.mkdir()
    model = {"name": "nano", "num_layers": 2, "num_experts": experts, "top_k": 2}
    (folder / "config.json").write_text(json.dumps({"model": model, "router": {"name": "topk"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_a_run_without_a_trace_shows_its_log_and_says_what_makes_a_trace(tmp_path: Path) -> None:
    found = find_source(str(run_folder(tmp_path / "r", [record(1), record(2)])))
    assert found.trace is None
    assert found.log is not None
    assert f"python launch/trace.py run={tmp_path / 'r'}" in found.note
    facts = dict(found.facts)
    assert facts["model"] == "nano: 2 layers of 4 experts, 2 a token"
    assert facts["training log"] == "steps 1 to 2, 2 logged"


def test_maps_and_curves_of_a_log_are_its_numbers_after_a_round_trip(tmp_path: Path) -> None:
    records = [record(n) for n in (1, 2, 4)] + [{"step": 4, "validation/loss": 6.5}]
    save_log(tmp_path / "log", read_log(records))
    side = Side("r", (), open_log(tmp_path / "log"))
    assert sources_of(side) == [LOG]
    assert steps_of(side, LOG) == (1, 2, 4)
    for step, logged in ((1, 0), (2, 1), (3, 1), (4, 2), (None, 2)):
        shown = map_of(side, LOG, quantity=LOAD, step=step)
        expected = load_ratio(records[logged]["router/load_LE"])
        np.testing.assert_allclose(shown, expected, rtol=1e-6)
    panels = {panel.title: panel for panel in curves_of([side])}
    loss, validation = panels["Loss"].lines
    assert loss.value_N.tolist() == [6.9, 6.8, 6.6]
    assert (validation.step_N.tolist(), validation.value_N.tolist()) == ([4], [6.5])
    deviation = [coefficient_of_variation(r["router/load_LE"]).max() for r in records[:3]]
    np.testing.assert_allclose(panels["Load deviation"].lines[1].value_N, deviation, rtol=1e-5)
    assert panels["Dead experts"].lines[0].value_N.tolist() == [1, 1, 1]


def test_a_dead_expert_is_a_gap_and_a_cross_and_json_can_hold_the_figure() -> None:
    side = Side("<b>r</b>", (), read_log([record(1, loss=math.nan)]))
    scale = scale_of([side], LOG, quantity=LOAD)
    values_LE = map_of(side, LOG, quantity=LOAD, step=1)
    figure = map_figure(values_LE, scale, title=side.title, chosen=(1, 2))
    heat = figure["data"][0]
    assert heat["z"][0][1] is None
    assert heat["text"][0][1] == "\u00d7"
    assert heat["z"][1][2] == pytest.approx(
        float(np.clip(np.log2(values_LE[1, 2]), np.log2(scale.low), np.log2(scale.high)))
    )
    assert figure["layout"]["title"]["text"] == "&lt;b&gt;r&lt;/b&gt;"
    json.dumps([figure, *(curve_figure(c) for c in curves_of([side]))], allow_nan=False)


def test_records_without_a_usable_load_are_left_out() -> None:
    bad: list[Any] = [
        None,
        "x",
        [[0.5, math.nan]],
        [[-1.0, 2.0]],
        [[math.inf, 1.0]],
        [0.5, 0.5],
        [[0.5], [0.5, 1]],
    ]
    records = [record(n, **{"router/load_LE": value}) for n, value in enumerate(bad)]
    assert not read_log(records).has_routing
    assert read_log([*records, record(9)]).step_S.tolist() == [9]
    assert read_log([]).series == {}


def test_a_dense_model_and_a_run_without_routing_are_refused(tmp_path: Path) -> None:
    dense = run_folder(tmp_path / "dense", [{"step": 1, "loss": 1.0}], experts=0)
    with pytest.raises(ConfigError, match="a dense model"):
        find_source(str(dense))
    empty = run_folder(tmp_path / "empty", [{"step": 1, "loss": 1.0}])
    with pytest.raises(DataError, match=r"no step with expert loads.*launch/trace\.py"):
        find_source(str(empty))


def test_a_trace_with_a_domain_that_was_asked_for_and_is_empty_is_refused(tmp_path: Path) -> None:
    batch = random_batch(1, with_logits=False, domains=2)
    domains = ("code", "law", "news")
    folder = write_trace(tmp_path / "t", iter([batch]), layout=LAYOUT, domains=domains)
    facts = dict(find_source(str(folder)).facts)
    assert facts["domains"].endswith("without a token: news")
    info = read_info(folder / TRACE_NAME)
    settings = json.dumps({"domains": ["news"]})
    write_info(folder / TRACE_NAME, dataclasses.replace(info, settings=settings))
    with pytest.raises(DataError, match=r"asked for domain 'news' and has no tokens"):
        find_source(str(folder))


def test_a_trace_of_another_shape_than_the_run_is_refused(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "r", [record(1)])
    batch = random_batch(1, with_logits=False)
    trace = write_trace(tmp_path / "t", iter([batch]), layout=LAYOUT, domains=("a", "b", "c"))
    with pytest.raises(DataError, match=r"another model than .* num_layers is 3, and 2 in the run"):
        find_source(str(run), trace=str(trace))


def test_a_folder_of_something_else_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a run nor a trace"):
        find_source(str(tmp_path))
    with pytest.raises(DataError, match=r"compare: .* does not exist"):
        find_source(str(tmp_path / "none"), key="compare")


def test_a_page_file_comes_back_as_it_was_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    page = PageFile((SideFiles("r", (("model", "nano"),), None, None),), None, "why", ("note",))
    save_page(tmp_path / "page.json", page)
    assert open_page(tmp_path / "page.json") == page
    assert open_side(page.sides[0]).facts == (("model", "nano"),)
    (tmp_path / "page.json").write_text("{")
    with pytest.raises(DataError, match="is no page"):
        open_page(tmp_path / "page.json")
