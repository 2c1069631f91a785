"""Measure the page of launch/explore.py on a large trace: its index, then clicks in a real browser.

usage: python launch/measure_explore.py [rows=10000000] [folder=FOLDER] [output=FILE]

Writes synthetic traces of 2 and of 16 layers (16 experts, top 2, 32,064 token ids, 8 domains, 20
recorded steps) to the folder unless they are there, counts each in a process of its own, then
starts the page and times from an action to its result in a headless Chromium: the browser found as
`chromium`, driven by playwright.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measured_on import measured_on

from analysis.explore.index import build_index
from moe.data.manifest import FileEntry
from moe.errors import UserError
from moe.trace.batch import Layout, TraceBatch
from moe.trace.info import SCHEMA_VERSION, PartEntry, TraceInfo, rank_name, write_info
from moe.trace.parquet import PartFile
from moe.trace.read import open_trace
from moe.train.atomic_files import hash_file, replace_file

LAYERS = (2, 16)
EXPERTS, CHOICES, VOCAB, DOMAINS, DOCUMENT, STEPS = 16, 2, 32_064, 8, 500, 20
REPEATS = 5
_HERE = Path(__file__).resolve().parent
_DEFAULTS = {
    "rows": "10000000",
    "folder": str(Path(tempfile.gettempdir()) / "explore_traces"),
    "output": str(_HERE / "results" / "explore_cpu.json"),
}


def write_trace(folder: Path, *, rows: int, layers: int) -> None:
    """A finished recording of STEPS steps; tokens by a power law, experts by token and chance."""
    folder.mkdir(parents=True)
    layout = Layout(layers, EXPERTS, CHOICES, has_logits=False, has_steps=True)
    parts = []
    for number in range(STEPS):
        step = (number + 1) * 10
        path = folder / f"step_{step:08d}.rank_00000.parquet"
        part = PartFile(path, layout, row_group_tokens=2**16)
        tokens = np.zeros(DOMAINS, np.int64)
        first, stop = rows * number // STEPS, rows * (number + 1) // STEPS
        for batch in _batches(first, stop, layers=layers, step=step):
            part.add(batch)
            tokens += np.bincount(batch.domain_T, minlength=DOMAINS)
        written = part.finish()
        documents = -(-(stop - first) // DOCUMENT)
        parts.append(
            PartEntry(path.name, written.size, written.sha256, 1, documents,
                      tuple(tokens.tolist()), step=step)
        )  # fmt: skip
    words = json.dumps([f" word{n}" for n in range(VOCAB)]).encode()
    replace_file(folder / "vocabulary.json", words)
    size, sha256 = hash_file(folder / "vocabulary.json")[0]
    info = TraceInfo(
        SCHEMA_VERSION, "training", layers, EXPERTS, CHOICES, False,
        tuple(f"domain{n}" for n in range(DOMAINS)), f"{layers:064x}", f"{rows:064x}", "{}",
        tuple(parts), FileEntry("vocabulary.json", size, sha256),
    )  # fmt: skip
    write_info(folder / rank_name(0), info)


def _batches(first: int, stop: int, *, layers: int, step: int) -> Iterator[TraceBatch]:
    source = np.random.default_rng(first)
    for start in range(first, stop, 2**16):
        row_T = np.arange(start, min(start + 2**16, stop))
        token_T = source.zipf(1.3, size=len(row_T)).clip(max=VOCAB).astype(np.int32) - 1
        habit_TL = (token_T[:, None] * 7 + np.arange(layers)) % EXPERTS
        noise_TL = source.integers(EXPERTS, size=(len(row_T), layers))
        first_TL = np.where(source.random((len(row_T), layers)) < 0.4, habit_TL, noise_TL)
        second_TL = (first_TL + source.integers(1, EXPERTS, size=first_TL.shape)) % EXPERTS
        weight_TL = source.random((len(row_T), layers), dtype=np.float32)
        yield TraceBatch(
            token_T, (row_T % DOCUMENT).astype(np.int32), row_T // DOCUMENT,
            (row_T // DOCUMENT % DOMAINS).astype(np.int16),
            np.stack([first_TL, second_TL], axis=2).astype(np.int16),
            np.stack([0.5 + weight_TL / 2, 0.5 - weight_TL / 2], axis=2),
            None, np.full(len(row_T), step, np.int64),
        )  # fmt: skip


def count(folder: Path) -> dict[str, Any]:
    """Build the index in this process; seconds, peak memory and size."""
    started = time.perf_counter()
    index = build_index(open_trace(folder), folder, on_progress=lambda *_: None)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "index_mib": round(index.path.stat().st_size / 2**20, 1),
    }


def click_through(folder: Path) -> dict[str, Any]:
    """Seconds from an action to its result on the page; median and worst of REPEATS."""
    command = [sys.executable, str(_HERE / "explore.py"), f"trace={folder}", "browser=false"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout is not None
            address = next(
                (line.split()[1] for line in page.stdout if line.startswith("page: ")), None
            )
            if address is None:
                raise UserError("measure_explore: the page did not start; see what it said above.")
            return _in_browser(address)
        finally:
            page.terminate()


def _in_browser(address: str) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise UserError("measure_explore: no chromium on the path; install it (apt-get install).")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1280, "height": 1600})
        started = time.perf_counter()
        view.goto(address)
        view.wait_for_selector("[data-card=examples]", timeout=120_000)
        view.wait_for_selector(".js-plotly-plot .hm, .js-plotly-plot .heatmaplayer")
        found: dict[str, Any] = {"open_page": round(time.perf_counter() - started, 2)}

        def drawn() -> str:
            plot = view.locator(".js-plotly-plot").first
            return plot.evaluate("e => JSON.stringify(e.data[0].customdata)")

        def panel() -> str:
            return view.locator(".ex-expert").first.inner_html()

        def timed(name: str, action: Callable[[int], None], watched: Callable[[], str]) -> None:
            taken = []
            for turn in range(REPEATS):
                before = watched()
                started = time.perf_counter()
                action(turn)
                while watched() == before:
                    time.sleep(0.01)
                    if time.perf_counter() - started > 60:
                        raise UserError(f"measure_explore: {name}: nothing changed in 60 s.")
                taken.append(time.perf_counter() - started)
                view.wait_for_timeout(1000)  # the plot is drawn, and takes clicks again
            found[name] = {
                "median": round(statistics.median(taken), 3),
                "worst": round(max(taken), 3),
            }

        source, quantity = view.locator("select").nth(0), view.locator("select").nth(1)
        expert = view.get_by_label("expert", exact=True)

        def click_map(turn: int) -> None:
            box = view.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
            assert box is not None
            view.mouse.click(box["x"] + box["width"] * (0.1 + 0.15 * turn), box["y"] + 10)

        def press_slider(turn: int) -> None:
            view.locator("[role=slider]").first.press("ArrowLeft")

        timed("slider", press_slider, drawn)
        timed("click_expert", click_map, panel)
        timed("choose_expert", lambda turn: _choose(expert, str(turn)), panel)
        timed("quantity", lambda turn: _choose(quantity, turn % 2 + 1, by_place=True), drawn)
        timed("source", lambda turn: _choose(source, (turn + 1) % 2, by_place=True), drawn)
        browser.close()
        return found


def _choose(element: Any, value: Any, *, by_place: bool = False) -> None:
    if by_place:
        element.select_option(index=value)
    else:
        element.select_option(label=value)


def main() -> None:
    """Write, count, click, and report."""
    parts = [word.partition("=") for word in sys.argv[1:]]
    words = {name: value for name, _, value in parts}
    if "--count" in words:  # a process of its own, for its peak memory
        print(json.dumps(count(Path(words["folder"]))))
        return
    unknown = sorted(set(words) - set(_DEFAULTS))
    if unknown:
        sys.exit(f"{unknown[0]}: unknown; allowed: {', '.join(_DEFAULTS)}.\n{__doc__}")
    asked = _DEFAULTS | words
    rows, report = int(asked["rows"]), {"measured_on": measured_on(), "rows": int(asked["rows"])}
    for layers in LAYERS:
        folder = Path(asked["folder"]) / f"{rows}_rows_{layers}_layers"
        if not (folder / rank_name(0)).exists():
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted start
            write_trace(folder, rows=rows, layers=layers)
            print(f"wrote {folder}", flush=True)
        for old in folder.glob("explore-*"):
            old.unlink()
        done = subprocess.run(
            [sys.executable, __file__, "--count", f"folder={folder}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        index = json.loads(done.stdout)
        print(f"{layers} layers: index {index}", flush=True)
        seconds = click_through(folder)
        print(f"{layers} layers: page {seconds}", flush=True)
        report[f"{layers}_layers"] = {"index": index, "page_seconds": seconds}
    replace_file(Path(asked["output"]), json.dumps(report, indent=1).encode() + b"\n")
    print(f"output: {asked['output']}")


if __name__ == "__main__":
    main()
