"""The index: what it holds is what the analysis counts; damaged, changed and old ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from synthetic_trace import random_batch, write_trace

from analysis.count_trace import count_trace
from analysis.explore import index as index_module
from analysis.explore.index import build_index, find_index, index_name, open_index
from moe.errors import DataError
from moe.trace.batch import Layout
from moe.trace.info import TRACE_NAME, read_info, write_info
from moe.trace.read import Trace, open_trace

LAYOUT = Layout(3, 8, 2, has_logits=True, has_steps=False)
DOMAINS = ("code", "law", "news")


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    batches = iter([random_batch(n, tokens=500) for n in range(2)])
    return open_trace(write_trace(tmp_path / "t", batches, layout=LAYOUT, domains=DOMAINS))


def quiet(what: str, done: int, total: int) -> None:
    assert 0 < done <= total


def test_the_index_holds_what_the_analysis_counts(trace: Trace) -> None:
    index = build_index(trace, trace.folder, on_progress=quiet)
    counts = count_trace(trace, vocab_size=50)
    assert counts.tokens is not None
    for name in ("choice_LDGE", "token_DG", "choice_LKE", "weight_LE"):
        np.testing.assert_array_equal(
            getattr(index.routing, name), getattr(counts.routing, name), err_msg=name
        )
    np.testing.assert_array_equal(index.array("pairs/pair_LEE"), counts.pairs.pair_LEE)
    for layer in range(3):
        table = index.of_layer("tokens/choice_LXE", layer)
        np.testing.assert_array_equal(table, counts.tokens.choice_LXE[layer, : len(table)])
    assert (index.num_tokens, index.steps, index.vocabulary) == (1000, (), None)
    assert index.info.domains == DOMAINS


def test_a_second_start_finds_the_index_and_reads_no_row(trace: Trace, monkeypatch) -> None:
    build_index(trace, trace.folder, on_progress=quiet)
    monkeypatch.setattr(Trace, "_rows", lambda *a: pytest.fail("the trace was read again"))
    assert find_index(trace.folder, trace.info) is not None


def test_the_steps_of_a_recording_are_counted_apart(tmp_path: Path) -> None:
    steps = (10, 20)
    batches = [random_batch(s, tokens=300)._replace(step_T=np.full(300, s)) for s in steps]
    layout = LAYOUT._replace(has_steps=True)
    folder = write_trace(tmp_path / "t", iter(batches), layout=layout, domains=DOMAINS)
    info = read_info(folder / TRACE_NAME)
    # one part for both: only what the JSON says of steps matters here
    part = dataclasses.replace(info.parts[0], step=10)
    write_info(folder / TRACE_NAME, dataclasses.replace(info, parts=(part,)))
    index = build_index(open_trace(folder), folder, on_progress=quiet)
    assert index.steps == (10,)
    expected = np.zeros((3, 3, 8), np.int64)
    for row in range(300):
        for layer in range(3):
            for expert in batches[0].expert_TLK[row, layer]:
                expected[layer, batches[0].domain_T[row], expert] += 1
    np.testing.assert_array_equal(index.array("steps/load_SLDE")[0], expected)


def test_another_trace_or_schema_has_another_index_and_the_old_one_goes(
    trace: Trace, monkeypatch
) -> None:
    first = build_index(trace, trace.folder, on_progress=quiet)
    other = dataclasses.replace(trace.info, model_sha256="1" * 64)
    assert index_name(other) != index_name(trace.info)
    monkeypatch.setattr(index_module, "INDEX_SCHEMA", index_module.INDEX_SCHEMA + 1)
    assert find_index(trace.folder, trace.info) is None
    second = build_index(trace, trace.folder, on_progress=quiet)
    assert second.path != first.path
    assert not first.path.exists()
    assert (trace.folder / TRACE_NAME).exists()


@pytest.mark.parametrize("place", [40, -40, 0.5])
def test_a_changed_byte_of_the_index_is_found_and_it_is_made_again(trace: Trace, place) -> None:
    path = build_index(trace, trace.folder, on_progress=quiet).path
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    assert find_index(trace.folder, trace.info) is None
    with pytest.raises(DataError, match="no whole index"):
        open_index(path)
    build_index(trace, trace.folder, on_progress=quiet)
    assert find_index(trace.folder, trace.info) is not None


def test_a_changed_name_in_the_header_is_found(trace: Trace) -> None:
    path = build_index(trace, trace.folder, on_progress=quiet).path
    content = path.read_bytes()
    assert content.count(b"news") == 1
    path.write_bytes(content.replace(b"news", b"mews"))
    assert find_index(trace.folder, trace.info) is None


def test_a_truncated_index_is_made_again(trace: Trace) -> None:
    path = build_index(trace, trace.folder, on_progress=quiet).path
    path.write_bytes(path.read_bytes()[:-10])
    assert find_index(trace.folder, trace.info) is None


def test_a_failed_count_leaves_no_file_behind(trace: Trace) -> None:
    part = trace.folder / trace.info.parts[0].name
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    before = sorted(p.name for p in trace.folder.iterdir())
    with pytest.raises(DataError, match="changed after it was written"):
        build_index(trace, trace.folder, on_progress=quiet)
    assert sorted(p.name for p in trace.folder.iterdir()) == before
