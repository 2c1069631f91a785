"""What the page says of one expert against loops over every row of a trace."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from synthetic_trace import random_batch, write_trace

from analysis.balance import domain_share
from analysis.co_activation import chance_pairs
from analysis.count_trace import count_trace
from analysis.explore.examples import NOTHING
from analysis.explore.expert import describe_expert
from analysis.explore.index import TraceIndex, build_index
from analysis.explore.maps import (
    LEAD,
    LOAD,
    TRACE,
    WEIGHT,
    Side,
    map_of,
    quantities_of,
    scale_of,
    sources_of,
)
from analysis.explore.pieces import expert_panel, header, numbers_table, token_text
from moe.trace.batch import Layout, TraceBatch
from moe.trace.read import open_trace

LAYOUT = Layout(3, 8, 2, has_logits=True, has_steps=False)
DOMAINS = ("code", "law", "news")
NASTY = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def batch() -> TraceBatch:
    return random_batch(7, tokens=12_000, vocab=3000)


@pytest.fixture(scope="module")
def index(batch: TraceBatch, tmp_path_factory) -> TraceIndex:
    folder = tmp_path_factory.mktemp("trace")
    trace = open_trace(write_trace(folder, iter([batch]), layout=LAYOUT, domains=DOMAINS))
    return build_index(trace, folder, on_progress=lambda *_: None)


def test_tokens_are_those_of_first_choices_by_lift_and_by_count(batch, index) -> None:
    found = describe_expert(index, layer=1, expert=4)
    first = Counter(t for t, e in zip(batch.token_T, batch.expert_TLK[:, 1, 0], strict=True)
                    if e == 4)  # fmt: skip
    seen, usual = Counter(batch.token_T), sum(first.values()) / batch.num_rows
    assert found.num_first == sum(first.values())
    for row in (*found.by_lift, *found.by_count):
        assert (row.num_first, row.num_tokens) == (first[row.token], seen[row.token])
        assert row.lift == pytest.approx(first[row.token] / seen[row.token] / usual)
    counts = [row.num_first for row in found.by_count]
    assert counts == sorted(first.values(), reverse=True)[: len(counts)]
    lifts = [row.lift for row in found.by_lift]
    every = [n / seen[t] / usual for t, n in first.items() if seen[t] >= found.least_count]
    np.testing.assert_allclose(lifts, sorted(every, reverse=True)[: len(lifts)])


def test_domains_partners_and_load_are_those_of_all_choices(batch, index) -> None:
    found = describe_expert(index, layer=2, expert=1)
    chose_T = (batch.expert_TLK[:, 2] == 1).any(axis=1)
    assert found.num_tokens == chose_T.sum()
    assert found.load == pytest.approx(chose_T.mean() / found.even_share)
    weights = batch.weight_TLK[:, 2][batch.expert_TLK[:, 2] == 1]
    assert found.weight == pytest.approx(float(weights.mean()), abs=1e-6)
    for number, row in enumerate(found.domains):
        assert row.share == pytest.approx(chose_T[batch.domain_T == number].mean())
        assert row.num_tokens == (batch.domain_T == number).sum()
        assert row.low < row.share < row.high
    partners = Counter(batch.expert_TLK[:, 2][chose_T].ravel().tolist())
    del partners[1]
    assert {row.expert: row.share for row in found.partners} == pytest.approx(
        {expert: n / chose_T.sum() for expert, n in partners.items()}
    )
    assert [r.share for r in found.partners] == sorted(
        [r.share for r in found.partners], reverse=True
    )


def test_intervals_and_chance_are_the_analysis_own(index, batch) -> None:
    counts = index.routing
    whole = domain_share(counts)
    found = describe_expert(index, layer=0, expert=3)
    np.testing.assert_allclose([r.low for r in found.domains], whole.low[:, 0, 3])
    np.testing.assert_allclose([r.high for r in found.domains], whole.high[:, 0, 3])
    pair_EE = index.array("pairs/pair_LEE")[0]
    for row in found.partners:
        assert row.chance == pytest.approx(chance_pairs(pair_EE)[3, row.expert] / found.num_tokens)


def test_positions_are_first_choices_by_doubling_ranges(batch, index) -> None:
    found = describe_expert(index, layer=0, expert=2)
    is_first_T = batch.expert_TLK[:, 0, 0] == 2
    for row in found.positions:
        inside_T = (batch.position_T >= row.first) & (batch.position_T <= (row.last or 10**9))
        if row.first == 0:
            inside_T = batch.position_T == 0
        assert row.num_tokens == inside_T.sum()
        assert row.lift == pytest.approx(is_first_T[inside_T].mean() / is_first_T.mean())


def test_examples_point_at_the_token_that_was_taken(batch, index) -> None:
    found = describe_expert(index, layer=1, expert=6)
    assert found.examples
    for example in found.examples:
        row = int(np.flatnonzero((batch.document_T == example.document)
                                 & (batch.position_T == example.position))[0])  # fmt: skip
        assert example.tokens[example.centre] == batch.token_T[row]
        assert 6 in batch.expert_TLK[row, 1]
        assert example.domain == DOMAINS[batch.domain_T[row]]
        assert NOTHING not in example.tokens


def test_maps_of_a_trace_are_the_analysis_numbers(batch, index) -> None:
    side = Side("t", (), None, index)
    assert sources_of(side) == [TRACE]
    assert quantities_of(side, TRACE) == [
        LOAD, "load within code", "load within law", "load within news", WEIGHT, LEAD
    ]  # fmt: skip
    law_LE, mean_LE = np.zeros((3, 8)), np.zeros((3, 8))
    for layer in range(3):
        for expert in range(8):
            is_mine_TK = batch.expert_TLK[:, layer] == expert
            law_LE[layer, expert] = is_mine_TK[batch.domain_T == 1].sum()
            mean_LE[layer, expert] = batch.weight_TLK[:, layer][is_mine_TK].mean()
    law_LE = law_LE / law_LE.sum(axis=1, keepdims=True) * 8
    shown = map_of(side, TRACE, quantity="load within law", step=None)
    np.testing.assert_allclose(shown, law_LE)
    np.testing.assert_allclose(map_of(side, TRACE, quantity=WEIGHT, step=None), mean_LE, atol=1e-6)
    scale = scale_of([side], TRACE, quantity=LOAD)
    assert scale.is_ratio
    assert scale.low == 1 / scale.high


def test_an_expert_that_does_not_exist_is_refused(index) -> None:
    with pytest.raises(ValueError, match="no such expert"):
        describe_expert(index, layer=3, expert=0)


def test_a_dead_expert_is_said_to_be_dead(batch, tmp_path: Path) -> None:
    moved = batch._replace(expert_TLK=np.where(batch.expert_TLK == 5, 7, batch.expert_TLK))
    folder = write_trace(tmp_path / "t", iter([moved]), layout=LAYOUT, domains=DOMAINS)
    index = build_index(open_trace(folder), folder, on_progress=lambda *_: None)
    found = describe_expert(index, layer=0, expert=5)
    assert found.num_tokens == 0
    assert "it is dead" in expert_panel(found, None, title="t")


def test_nothing_that_a_trace_says_becomes_markup(index) -> None:
    panel = expert_panel(describe_expert(index, layer=0, expert=0), [NASTY] * 50, title=NASTY)
    assert "<script" not in panel
    assert "&lt;script&gt;" in panel
    side = Side(NASTY, ((NASTY, NASTY),), None, index)
    assert "<script" not in header([side, side], notes=[NASTY])
    assert "<script" not in numbers_table([[1.0, float("nan")]], unit=NASTY, name=f"'{NASTY}'")


def test_white_space_and_missing_texts_of_tokens_can_be_seen() -> None:
    words = [" a\n", "", "\u202e\x00", "x" * 40, "&"]
    assert token_text(0, words) == "\u00b7a\u23ce"
    assert token_text(1, words) == "<i>id&nbsp;1</i>"
    assert token_text(2, words) == "\ufffd\ufffd"  # what would turn the line round is not passed on
    assert len(token_text(3, words)) == 24
    assert token_text(4, words) == "&amp;"
    assert token_text(9, words) == token_text(9, None) == "<i>id&nbsp;9</i>"


def test_counts_of_the_index_are_of_the_whole_trace(index, batch) -> None:
    counts = count_trace(open_trace(index.path.parent))
    np.testing.assert_array_equal(index.routing.load_LE, counts.routing.load_LE)
