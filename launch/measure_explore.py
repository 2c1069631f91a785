"""Measure the page of launch/explore.py on a large trace: its index, then clicks in a real browser.

usage: python launch/measure_explore.py [--tokens 10000000] [--folder DIR] [--json FILE]

Writes random traces of 2 and of 16 layers (16 experts, top 2, 20 recorded steps), counts each in a
process of its own, then starts the page and times from an action to its result in a headless
Chromium: the browser found as `chromium`, driven by playwright. Exits with 1 where an index took
more than 60 s or 2 GB (10^9 bytes each), or an action two seconds. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parent), str(_HERE.parent / "kernels"), str(_HERE)]

from measured_on import measured_on  # noqa: E402 the path comes first
from random_trace import Shape, write_random_trace  # noqa: E402
from resident_memory import rss_bytes  # noqa: E402

from analysis.explore.index import build_index  # noqa: E402
from moe.errors import UserError  # noqa: E402
from moe.trace.batch import Layout  # noqa: E402
from moe.trace.read import open_trace  # noqa: E402
from moe.train.atomic_files import replace_file  # noqa: E402

LAYERS = (2, 16)
EXPERTS, CHOICES, STEPS = 16, 2, 20
ACTIONS = ("slider", "click_expert", "choose_expert", "quantity", "source")
REPEATS = 5


def count(folder: Path) -> dict[str, Any]:
    """Build the index in this process; seconds, peak memory and size."""
    started = time.perf_counter()
    index = build_index(open_trace(folder), folder, on_progress=lambda *_: None)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_bytes": rss_bytes("VmHWM"),
        "index_bytes": index.path.stat().st_size,
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


def main() -> int:
    """Write, count, click, and report; 1 where something took too long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the traces go; else a temporary folder")
    parser.add_argument("--json", type=Path, default=_HERE / "results" / "explore_cpu.json")
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.count is not None:  # a process of its own, for its peak memory
        print(json.dumps(count(asked.count)))
        return 0
    report: dict[str, Any] = measured_on() | {"tokens": asked.tokens}
    beyond: list[str] = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        for layers in LAYERS:
            report[f"{layers}_layers"] = numbers = _measure(Path(folder), layers, asked.tokens)
            beyond += [f"{layers} layers, {what}" for what in _beyond(numbers)]
    replace_file(asked.json, json.dumps(report, indent=1).encode() + b"\n")
    print(f"output: {asked.json}")
    for what in beyond:
        print(f"beyond the limit: {what}")
    return 1 if beyond else 0


def _measure(folder: Path, layers: int, num_tokens: int) -> dict[str, Any]:
    layout = Layout(layers, EXPERTS, CHOICES, has_logits=False, has_steps=True)
    trace = folder / f"{layers}_layers"
    write_random_trace(trace, Shape(trace.name, layout, num_tokens, STEPS))
    print(f"{layers} layers: written", flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--count", str(trace)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    index = json.loads(done.stdout)
    print(f"{layers} layers: index {index}", flush=True)
    seconds = click_through(trace)
    print(f"{layers} layers: page {seconds}", flush=True)
    return {"index": index, "page_seconds": seconds}


def _beyond(numbers: dict[str, Any]) -> list[str]:
    """Which of them are more than allowed."""
    index, page = numbers["index"], numbers["page_seconds"]
    found = [f"{name}: {page[name]['worst']} s" for name in ACTIONS if page[name]["worst"] > 2.0]
    if index["seconds"] > 60.0:
        found.append(f"index: {index['seconds']} s")
    if index["peak_bytes"] > 2e9:
        found.append(f"index: {index['peak_bytes'] / 1e9:.2f} GB")
    return found


if __name__ == "__main__":
    sys.exit(main())
