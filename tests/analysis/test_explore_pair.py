"""Agreement of two traces, where the answer is known: equal, renumbered, unrelated ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic_trace import random_batch, write_trace

from analysis.explore.pair import agreement, count_pair, open_pair, pair_path, save_pair
from moe.errors import DataError
from moe.trace.batch import Layout, TraceBatch
from moe.trace.read import Trace, open_trace

LAYOUT = Layout(3, 8, 2, has_logits=False, has_steps=False)
DOMAINS = ("code", "law", "news")


def written(folder: Path, batch: TraceBatch, layout: Layout = LAYOUT) -> Trace:
    return open_trace(write_trace(folder, iter([batch]), layout=layout, domains=DOMAINS))


def quiet(*_: object) -> None:
    return None


def test_equal_traces_agree_everywhere(tmp_path: Path) -> None:
    batch = random_batch(1, tokens=1500, with_logits=False)
    one, two = written(tmp_path / "a", batch), written(tmp_path / "b", batch)
    found = agreement(count_pair(one, two, on_progress=quiet))
    np.testing.assert_array_equal(found.same_numbers.estimate, 1.0)
    np.testing.assert_array_equal(found.renumbered_L, 1.0)
    np.testing.assert_array_equal(found.new_number_LE, np.tile(np.arange(8), (3, 1)))
    assert (found.chance_L < 0.5).all()


def test_a_renumbered_trace_agrees_after_the_renumbering_and_not_before(tmp_path: Path) -> None:
    batch = random_batch(2, tokens=1500, with_logits=False)
    order_LE = np.stack([np.random.default_rng(n).permutation(8) for n in range(3)])
    other = np.stack([order_LE[n][batch.expert_TLK[:, n]] for n in range(3)], axis=1)
    one = written(tmp_path / "a", batch)
    two = written(tmp_path / "b", batch._replace(expert_TLK=other.astype(np.int16)))
    halves = count_pair(one, two, on_progress=quiet)
    found = agreement(halves)
    np.testing.assert_array_equal(found.renumbered_L, 1.0)
    assert (found.same_numbers.estimate < 0.6).all()
    for layer in range(3):  # expert e is order[e] there, whose number here is e
        np.testing.assert_array_equal(found.new_number_LE[layer][order_LE[layer]], np.arange(8))


def test_unrelated_routings_agree_as_chance_does_even_after_renumbering(tmp_path: Path) -> None:
    batch = random_batch(3, tokens=6000, with_logits=False)
    source = np.random.default_rng(0)
    first = source.integers(8, size=(6000, 3))
    second = (first + source.integers(1, 8, size=first.shape)) % 8
    other = np.stack([first, second], axis=2).astype(np.int16)
    one, two = (
        written(tmp_path / "a", batch),
        written(tmp_path / "b", batch._replace(expert_TLK=other)),
    )
    found = agreement(count_pair(one, two, on_progress=quiet))
    np.testing.assert_allclose(found.same_numbers.estimate, found.chance_L, atol=0.02)
    np.testing.assert_allclose(found.renumbered_L, found.chance_L, atol=0.02)


def test_counts_are_kept_and_a_damaged_file_says_so(tmp_path: Path) -> None:
    batch = random_batch(4, tokens=600, with_logits=False)
    one, two = written(tmp_path / "a", batch), written(tmp_path / "b", batch)
    halves = count_pair(one, two, on_progress=quiet)
    path = pair_path(tmp_path, one, two)
    save_pair(path, halves)
    np.testing.assert_array_equal(open_pair(path)[1].joint_LEE, halves[1].joint_LEE)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="is damaged"):
        open_pair(path)


def test_models_of_another_shape_and_other_tokens_are_refused(tmp_path: Path) -> None:
    batch = random_batch(5, tokens=300, with_logits=False)
    one = written(tmp_path / "a", batch)
    wide = written(tmp_path / "b", batch, LAYOUT._replace(num_experts=16))
    with pytest.raises(DataError, match="3 layers of 16 experts"):
        count_pair(one, wide, on_progress=quiet)
    moved = written(tmp_path / "c", batch._replace(token_T=batch.token_T + 1))
    with pytest.raises(DataError):
        count_pair(one, moved, on_progress=quiet)
