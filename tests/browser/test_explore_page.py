"""launch/explore.py as a user has it: the command, its page in a real Chromium, its requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect
from served_page import Opener, Watched, contrast, served

from analysis.count_trace import count_trace
from analysis.overlap import count_overlap, saturation
from analysis.specialisation import top_keys
from analysis.utilisation import coefficient_of_variation, load_ratio
from moe.trace.batch import join_rows
from moe.trace.read import open_trace
from moe.train.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def opener(browser: Browser) -> Iterator[Opener]:
    """Call opener(address, width=..., dark=...): the page, loaded."""
    contexts = []

    def of(address: str, *, width: int = 1280, dark: bool = False) -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": 1500}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        watched = Watched(context.new_page(), [], [])
        watched.page.on("console", lambda m: watched.said.append(f"{m.type}: {m.text}"))
        watched.page.on("pageerror", lambda e: watched.said.append(f"error: {e}"))
        watched.page.on("request", lambda r: watched.asked.append(r.url))
        watched.page.goto(address)
        watched.page.wait_for_selector(".js-plotly-plot .nsewdrag", timeout=60_000)
        watched.page.wait_for_timeout(1000)
        return watched

    yield of
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def of_run(place: Path, environment, opener: Opener) -> Iterator[Watched]:
    """The page of runs/r."""
    with served(place, environment, "run=runs/r") as address:
        yield opener(address)


@pytest.fixture(scope="module")
def of_two(place: Path, environment, opener: Opener) -> Iterator[tuple[Watched, str]]:
    """The page of both traces, and its address."""
    with served(place, environment, "trace=traces/a", "compare=traces/b") as address:
        yield opener(address), address


def shown_map(page: Page, number: int = 0) -> np.ndarray:
    """The numbers of the table below a map, (L, E)."""
    rows = page.locator(".ex-numbers tbody").nth(number).evaluate(
        "t => [...t.rows].map(r => [...r.cells].slice(1).map(c => Number(c.textContent)))"
    )  # fmt: skip
    return np.array(rows)


def choose(page: Page, name: str, option: str) -> None:
    page.get_by_label(name, exact=True).select_option(label=option)


def test_the_map_of_a_run_is_that_of_its_log_and_follows_the_slider(of_run, place) -> None:
    page = of_run.page
    records = [r for r in read_metrics(place / "runs/r/metrics.jsonl") if "router/load_LE" in r]
    expect(page.locator(".ex-now")).to_have_text("load, at step 8")
    np.testing.assert_allclose(
        shown_map(page), load_ratio(records[-1]["router/load_LE"]), atol=6e-5
    )
    slider = page.get_by_role("slider")
    slider.focus()
    for step in (7, 6, 5):  # without touching it again: the focus stays
        page.keyboard.press("ArrowLeft")
        expect(page.locator(".ex-now")).to_have_text(f"load, at step {step}")
        expected = load_ratio(records[step - 1]["router/load_LE"])
        np.testing.assert_allclose(shown_map(page), expected, atol=6e-5)
        plot = page.locator(".js-plotly-plot").first
        drawn = plot.evaluate("e => e.data[0].customdata")
        np.testing.assert_allclose(np.array(drawn, float), expected, atol=6e-5)


def test_a_click_on_the_map_shows_that_expert_and_its_tokens(of_run, place) -> None:
    page = of_run.page
    trace = open_trace(place / "runs/r/routing")
    counts = count_trace(trace, vocab_size=512)
    box = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    assert box is not None
    experts = trace.info.num_experts
    page.mouse.click(box["x"] + box["width"] * 5.5 / experts, box["y"] + box["height"] * 0.75)
    panel = page.locator(".ex-expert")
    expect(panel.locator("h3")).to_contain_text("Layer 1, expert 5")
    assert counts.tokens is not None
    best = top_keys(counts.tokens.choice_LXE[1], counts.tokens.token_X, expert=5, num_keys=12,
                    min_count=min(20, max(1, trace.info.num_tokens // 2000)))  # fmt: skip
    rows = panel.locator("[data-card=by-lift] tbody tr")
    assert [int(r.get_attribute("data-token") or -1) for r in rows.all()] == best.key_N.tolist()
    lifts = [
        float(text.strip("\u00d7")) for text in rows.locator("td:nth-child(2)").all_inner_texts()
    ]
    np.testing.assert_allclose(lifts, best.lift_N, atol=0.006)
    vocabulary = trace.vocabulary()
    assert vocabulary is not None
    first = rows.locator("td:first-child").first.inner_text()
    assert first.strip("\u00b7\u23ce\u21e5\u2026") in vocabulary[int(best.key_N[0])]
    assert panel.locator("[data-card=examples] .ex-chosen").count() > 0
    shares = counts.routing.load_LDE[1, :, 5] / counts.routing.token_D
    assert [f"{share:.1%}" for share in shares] == [
        text.split("(")[0].strip()
        for text in panel.locator("[data-card=domains] .ex-bar > :last-child").all_inner_texts()
    ]


def test_the_keyboard_alone_chooses_an_expert(of_run) -> None:
    page = of_run.page
    page.get_by_label("expert", exact=True).focus()
    before = page.locator(".ex-expert").get_attribute("data-expert")
    page.keyboard.press("ArrowDown" if before == "0" else "ArrowUp")
    after = str(int(before or 0) + (1 if before == "0" else -1))
    expect(page.locator(".ex-expert")).to_have_attribute("data-expert", after)


def test_play_goes_through_the_steps_by_itself_and_stops(of_run) -> None:
    page = of_run.page
    switch = page.get_by_role("switch")
    switch.click()
    seen = {page.locator(".ex-now").inner_text()}
    for _ in range(40):
        page.wait_for_timeout(100)
        seen.add(page.locator(".ex-now").inner_text())
    switch.click()
    page.wait_for_timeout(1200)
    still = page.locator(".ex-now").inner_text()
    page.wait_for_timeout(1500)
    assert len(seen) >= 3
    assert page.locator(".ex-now").inner_text() == still


def test_other_sources_and_quantities_of_the_same_run_are_shown(of_run, place) -> None:
    page = of_run.page
    trace = open_trace(place / "runs/r/routing")
    counts = count_trace(trace)
    choose(page, "tokens of the", "trace, all tokens")
    expect(page.locator(".ex-now")).to_have_text("load, of all tokens")
    np.testing.assert_allclose(shown_map(page), load_ratio(counts.routing.load_LE), atol=6e-5)
    choose(page, "map of", "load within more")
    expect(page.locator(".ex-now")).to_have_text("load within more, of all tokens")
    domain = trace.info.domains.index("more")
    expected = load_ratio(counts.routing.load_LDE[:, domain])
    np.testing.assert_allclose(shown_map(page), expected, atol=6e-5)
    choose(page, "map of", "mean weight")
    expect(page.locator(".ex-now")).to_have_text("mean weight, of all tokens")
    mean = counts.routing.weight_LE / counts.routing.load_LE
    np.testing.assert_allclose(shown_map(page), mean, atol=6e-5)
    choose(page, "tokens of the", "training log")
    expect(page.locator(".ex-now")).to_contain_text("load, at step")


def test_two_traces_stand_side_by_side_with_their_agreement(of_two, place) -> None:
    page = of_two[0].page
    traces = [open_trace(place / "traces" / name) for name in "ab"]
    for number, trace in enumerate(traces):
        load_LE = count_trace(trace).routing.load_LE
        np.testing.assert_allclose(shown_map(page, number), load_ratio(load_LE), atol=6e-5)
        cells = page.locator(f"[data-table=evenness] td:nth-child({number + 2})")
        expected = coefficient_of_variation(load_LE)
        assert cells.all_inner_texts() == [f"{value:.3f}" for value in expected]
    scales = page.locator(".js-plotly-plot").evaluate_all(
        "all => all.map(e => [e.data[0].zmin, e.data[0].zmax])"
    )
    assert scales[0] == scales[1]
    overlap = count_overlap(
        *(join_rows(list(trace.batches())) for trace in traces),
        num_experts=traces[0].info.num_experts, num_domains=len(traces[0].info.domains),
    )  # fmt: skip
    shared_LH = overlap.shared_CLH.sum(axis=0)
    assert page.locator("[data-table=agreement] td:nth-child(2)").all_inner_texts() == [
        f"{value:.1%}" for value in saturation(shared_LH)
    ]


def test_hostile_token_texts_are_shown_and_do_nothing(of_two) -> None:
    page = of_two[0].page
    page.get_by_label("of", exact=True).select_option(index=1)
    expect(page.locator(".ex-expert small").first).to_have_text("traces/b")
    said = page.locator(".ex-expert").inner_text()  # whichever tokens this expert was chosen for
    assert re.search(r"<script|<img|</td|onmouse|&lt;|\{\{7", said)
    page.wait_for_timeout(500)
    assert page.title() == "Experts"
    assert page.locator("#taken").count() == 0
    assert page.locator(".ex-expert script, .ex-expert img").count() == 0


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (390, False), (1280, True), (390, True)]
)
def test_the_page_fits_its_width_in_light_and_dark(of_two, opener, tmp_path, width, dark) -> None:
    watched = opener(of_two[1], width=width, dark=dark)
    page = watched.page
    page.screenshot(path=tmp_path / f"page_{width}_{'dark' if dark else 'light'}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cards = page.locator(".ex-card").evaluate_all("all => all.map(e => e.getBoundingClientRect())")
    assert cards
    assert all(card["left"] >= 0 and card["right"] <= width for card in cards)
    assert contrast(page, ".ex-expert p") >= 4.5


def test_the_browser_asked_nobody_but_this_machine_and_met_no_error(of_run, of_two) -> None:
    for watched in (of_run, of_two[0]):
        assert len(watched.asked) > 10
        hosts = {urlsplit(url).hostname for url in watched.asked if url.startswith(("http", "ws"))}
        assert hosts == {"127.0.0.1"}
        assert [line for line in watched.said if re.match(r"error|pageerror", line)] == []


def test_the_page_listens_on_this_machine_alone(of_two) -> None:
    port = urlsplit(of_two[1]).port
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    addresses = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    assert [a for a in addresses if a.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
