"""Examples and leads against a search over all rows, however the trace was cut into batches."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_trace import random_batch, rows

from analysis.explore.examples import NOTHING, Examples, _hash_of_place, collect_examples
from analysis.explore.leads import count_leads, lead_unit
from moe.errors import DataError
from moe.trace.batch import Layout, TraceBatch, slice_rows

LAYERS, EXPERTS, MOST, REACH = 3, 8, 4, 5


def collected(batch: TraceBatch, *, size: int) -> Examples:
    parts = [slice_rows(batch, n, min(n + size, batch.num_rows)) for n in
             range(0, batch.num_rows, size)]  # fmt: skip
    return collect_examples(
        iter(parts), num_layers=LAYERS, num_experts=EXPERTS, num_examples=MOST, reach=REACH
    )


def searched(batch: TraceBatch, layer: int, expert: int) -> list[int]:
    """Rows of the best token of each document, best documents first, by looking at every row."""
    places = _hash_of_place(batch)
    best: dict[int, tuple[float, int, int]] = {}
    for row in range(batch.num_rows):
        for k in range(batch.expert_TLK.shape[2]):
            if batch.expert_TLK[row, layer, k] == expert:
                key = (float(batch.weight_TLK[row, layer, k]), int(places[row]), row)
                document = int(batch.document_T[row])
                best[document] = max(best.get(document, key), key)
    return [row for _, _, row in sorted(best.values(), reverse=True)[:MOST]]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("with_ties", [False, True])
def test_examples_are_the_best_token_of_the_best_documents(size, with_ties) -> None:
    batch = random_batch(1, tokens=400)
    if with_ties:
        batch = batch._replace(weight_TLK=np.round(batch.weight_TLK, 1))
    found = collected(batch, size=size)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            best = searched(batch, layer, expert)
            assert found.document_LEN[layer, expert, : len(best)].tolist() == [
                int(batch.document_T[row]) for row in best
            ]
            assert found.position_LEN[layer, expert, : len(best)].tolist() == [
                int(batch.position_T[row]) for row in best
            ]
            assert (found.key_LEN[layer, expert, len(best) :] == 0).all()
            for n, row in enumerate(best):
                check_context(found, batch, (layer, expert, n), row)


def check_context(
    found: Examples, batch: TraceBatch, place: tuple[int, int, int], row: int
) -> None:
    for n, near in enumerate(range(row - REACH, row + REACH + 1)):
        is_inside = 0 <= near < batch.num_rows and batch.document_T[near] == batch.document_T[row]
        token = int(batch.token_T[near]) if is_inside else NOTHING
        expert = int(batch.expert_TLK[near, place[0], 0]) if is_inside else NOTHING
        assert (found.token_LENC[place][n], found.expert_LENC[place][n]) == (token, expert)


def test_steps_of_training_keep_documents_of_the_same_number_apart() -> None:
    batch = random_batch(2, tokens=100)
    twice = TraceBatch(*(None if c is None else np.concatenate([c, c]) for c in batch))  # type: ignore[arg-type]
    twice = twice._replace(step_T=np.repeat(np.array([10, 20]), 100))
    found = collected(twice, size=33)
    alone = collected(batch, size=33)
    of_steps = found.step_LEN[0, 0, :2]
    assert sorted(of_steps.tolist()) == [10, 20]
    assert (found.document_LEN[0, 0, :2] == alone.document_LEN[0, 0, 0]).all()


def test_a_context_ends_where_rows_of_its_document_are_missing() -> None:
    batch = rows(random_batch(6, tokens=200, mean_document=60), slice(None, None, 2))
    found = collected(batch, size=50)
    is_used_LEN = found.key_LEN > 0
    near_M = (found.token_LENC[is_used_LEN] != NOTHING).sum(axis=-1)
    assert len(near_M) > 20
    assert (near_M == 1).all()


def test_an_expert_that_nobody_chose_has_no_examples_and_nothing_at_all_none() -> None:
    batch = random_batch(3, tokens=60)
    batch = batch._replace(expert_TLK=np.where(batch.expert_TLK == 2, 3, batch.expert_TLK))
    found = collected(batch, size=60)
    assert (found.key_LEN[:, 2] == 0).all()
    assert np.isnan(found.weight_LEN[:, 2]).all()
    nothing = collect_examples(iter([]), num_layers=1, num_experts=2)
    assert (nothing.key_LEN == 0).all()


def test_an_expert_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match="expert"):
        collect_examples(iter([random_batch(4)]), num_layers=LAYERS, num_experts=4)


@pytest.mark.parametrize("with_logits", [True, False])
def test_leads_are_the_mean_over_the_tokens_that_chose_the_expert_first(with_logits) -> None:
    batch = random_batch(5, tokens=150, with_logits=with_logits)
    found = count_leads(batch, num_experts=EXPERTS)
    halves = [count_leads(slice_rows(batch, a, b), num_experts=EXPERTS) for a, b in
              ((0, 70), (70, 150))]  # fmt: skip
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            leads = []
            for row in range(150):
                if batch.expert_TLK[row, layer, 0] != expert:
                    continue
                if batch.logit_TLE is not None:
                    ordered = sorted(map(float, batch.logit_TLE[row, layer]), reverse=True)
                else:
                    ordered = list(map(float, batch.weight_TLK[row, layer]))
                leads.append(ordered[0] - ordered[1])
            assert found.mean_LE[layer, expert] == pytest.approx(np.mean(leads), abs=1e-6)
    np.testing.assert_allclose((halves[0] + halves[1]).mean_LE, found.mean_LE)


def test_a_trace_of_one_choice_without_logits_has_no_leads() -> None:
    assert lead_unit(Layout(1, 8, 1, has_logits=False, has_steps=False)) is None
    assert lead_unit(Layout(1, 8, 1, has_logits=True, has_steps=False)) == "nats of logits"
    assert lead_unit(Layout(1, 8, 2, has_logits=False, has_steps=False)) == "weight"
