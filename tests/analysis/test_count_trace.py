"""One pass over a trace on disk counts what counting all its rows at once counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_trace import random_batch, write_trace

from analysis import count_trace as module
from analysis.co_activation import count_pairs
from analysis.count_trace import count_steps, count_trace, gathered, layered
from analysis.key_counts import count_by_key, position_bucket
from analysis.layer_agreement import count_layer_pairs
from analysis.margins import count_margins
from analysis.routing_counts import count_routing
from moe.errors import DataError
from moe.trace.batch import Layout, TraceBatch, join_rows, slice_rows
from moe.trace.read import open_trace

DOMAINS = ("prose", "code", "maths")


def written(folder: Path, batch: TraceBatch) -> Path:
    has_logits, has_steps = batch.logit_TLE is not None, batch.step_T is not None
    layout = Layout(3, 8, 2, has_logits=has_logits, has_steps=has_steps)
    return write_trace(folder, iter([batch]), layout=layout, domains=DOMAINS)


def test_a_trace_on_disk_is_counted_as_its_rows_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = random_batch(0, tokens=1000)
    trace = open_trace(written(tmp_path, batch))
    monkeypatch.setattr(module, "_ROWS", 300)
    monkeypatch.setattr(module, "_LAYER_PAIR_TOKENS", 400)
    counts = count_trace(trace, vocab_size=50, threshold=0.1, num_groups=16)
    expected = {
        "routing": count_routing(batch, num_experts=8, num_domains=3, num_groups=16),
        "pairs": count_pairs(batch, num_experts=8),
        "positions": count_by_key(
            position_bucket(batch.position_T), batch.expert_TLK, num_keys=18, num_experts=8
        ),
        "tokens": count_by_key(batch.token_T, batch.expert_TLK, num_keys=50, num_experts=8),
        "layer_pairs": count_layer_pairs(batch, num_experts=8, stride=2),
        "margins": count_margins(batch, num_experts=8, num_domains=3, num_groups=16, threshold=0.1),
    }
    for name, whole in expected.items():
        part = getattr(counts, name)
        for field, value in vars(whole).items():
            np.testing.assert_allclose(getattr(part, field), value, rtol=1e-9, err_msg=field)


def test_without_logits_and_vocabulary_their_counts_are_left_out(tmp_path: Path) -> None:
    trace = open_trace(written(tmp_path, random_batch(0, with_logits=False)))
    counts = count_trace(trace)
    assert counts.tokens is None
    assert counts.margins is None
    assert counts.routing.num_tokens == 200


def test_steps_of_a_training_run_are_counted_apart(tmp_path: Path) -> None:
    batch = random_batch(0)
    step_T = np.repeat([10, 20, 30], [50, 100, 50])
    trace = open_trace(written(tmp_path, batch._replace(step_T=step_T)))
    counts = count_steps(trace)
    assert list(counts) == [10, 20, 30]
    for step, part in counts.items():
        rows = np.flatnonzero(step_T == step)
        alone = slice_rows(batch, rows[0], rows[-1] + 1)
        expected = count_routing(alone, num_experts=8, num_domains=3, num_groups=1)
        np.testing.assert_array_equal(part.choice_LDGE, expected.choice_LDGE)
    with pytest.raises(DataError, match="recorded in training"):
        count_steps(open_trace(written(tmp_path / "plain", batch)))


def test_batches_are_gathered_and_laid_out_without_a_change() -> None:
    batch = random_batch(0, with_logits=False)
    small = [slice_rows(batch, a, a + 20) for a in range(0, 200, 20)]
    larger = list(gathered(small, num_rows=90))
    assert [b.num_rows for b in larger] == [100, 100]
    np.testing.assert_array_equal(join_rows(larger).expert_TLK, batch.expert_TLK)
    expert = layered(batch).expert_TLK
    np.testing.assert_array_equal(expert, batch.expert_TLK)
    assert expert[:, 1, 0].flags.c_contiguous


def test_a_token_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    trace = open_trace(written(tmp_path, random_batch(0, with_logits=False)))
    with pytest.raises(DataError, match="key: the trace holds 49; it must be 0 to 39"):
        count_trace(trace, vocab_size=40)


def test_the_analysis_needs_no_torch() -> None:
    modules = sorted(p.stem for p in Path(module.__file__).parent.glob("*.py"))
    program = "; ".join(f"import analysis.{name}" for name in modules if name != "__init__")
    program += "; import sys; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
