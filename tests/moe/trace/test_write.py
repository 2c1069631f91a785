"""The writing thread: what it writes, what it leaves out, and what happens when it cannot."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.errors import UserError
from moe.sparse.router import Routing
from moe.trace.batch import Layout, join_rows
from moe.trace.info import PartEntry
from moe.trace.parquet import read_part
from moe.trace.write import PartLabel, Rows, TraceWriter

LAYOUT = Layout(num_layers=2, num_experts=4, top_k=2, has_logits=True, has_steps=True)


def forward_pass(number: int, *, num_rows: int = 10) -> tuple[Rows, list[Routing]]:
    """Rows number * 100 and on, every third of them padding, with a routing that says so."""
    generator = torch.Generator().manual_seed(number)
    token_T = np.arange(num_rows) + number * 100
    rows = Rows(
        token_T, np.arange(num_rows), token_T // 5, np.arange(num_rows) % 3,
        np.arange(num_rows) % 3 != 2,
    )  # fmt: skip
    routings = [
        Routing(
            torch.rand(num_rows, 2, generator=generator),
            torch.randint(0, 4, (num_rows, 2), generator=generator),
            torch.rand(num_rows, 4, generator=generator),
            torch.zeros(4, dtype=torch.int64),
        )
        for _ in range(2)
    ]
    return rows, routings


def written(folder: Path, parts: list[PartEntry]):
    every = {"columns": LAYOUT.columns, "layers": (0, 1), "max_rows": 10_000}
    return [join_rows(list(read_part(folder / p.name, LAYOUT, **every))) for p in parts]


def test_real_tokens_are_written_in_order_with_their_routing(tmp_path: Path) -> None:
    parts: list[PartEntry] = []
    passes = [forward_pass(number) for number in range(5)]
    with TraceWriter(tmp_path, LAYOUT, num_domains=3, on_part=parts.append) as writer:
        for number, (rows, routings) in enumerate(passes):
            label = PartLabel("a.parquet" if number < 3 else "b.parquet", step=9, rank=1)
            assert writer.put(label, rows, routings, forward_seconds=0.5) >= 0
    assert [part.name for part in parts] == ["a.parquet", "b.parquet"]
    assert [part.num_batches for part in parts] == [3, 2]
    assert [part.num_tokens for part in parts] == [21, 14]
    assert parts[0].tokens_of_domain == (12, 9, 0)
    assert parts[0].num_documents == 6
    assert parts[0].forward_seconds == 1.5
    assert (parts[0].step, parts[0].rank) == (9, 1)
    batch = join_rows(written(tmp_path, parts))
    valid = [rows.valid_T for rows, _ in passes]
    tokens = np.concatenate([rows.token_T[v] for (rows, _), v in zip(passes, valid, strict=True)])
    assert batch.token_T.tolist() == tokens.tolist()
    assert batch.document_T.tolist() == (tokens // 5).tolist()
    for layer in range(2):
        for values, name in (
            (batch.expert_TLK, "expert_TK"), (batch.weight_TLK, "weight_TK"),
            (batch.logit_TLE, "logit_TE"),
        ):  # fmt: skip
            expected = torch.cat([
                getattr(routings[layer], name)[torch.from_numpy(v)]
                for (_, routings), v in zip(passes, valid, strict=True)
            ])  # fmt: skip
            assert np.array_equal(values[:, layer], expected.numpy())
    assert (batch.step_T == 9).all()


def test_row_groups_have_the_fixed_number_of_tokens(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    with TraceWriter(
        tmp_path, LAYOUT, num_domains=3, on_part=lambda part: None, row_group_tokens=8
    ) as writer:
        for number, num_rows in enumerate((1, 40, 3, 7)):
            writer.put(PartLabel("a.parquet"), *forward_pass(number, num_rows=num_rows))
    file = parquet.ParquetFile(tmp_path / "a.parquet")
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert sizes == [8, 8, 8, 8, 3]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_part_is_on_the_disk_when_it_is_told_of_and_not_before(tmp_path: Path) -> None:
    seen = []
    with TraceWriter(
        tmp_path, LAYOUT, num_domains=3,
        on_part=lambda part: seen.append(sorted(p.name for p in tmp_path.iterdir())),
    ) as writer:  # fmt: skip
        writer.put(PartLabel("a.parquet"), *forward_pass(0))
        assert writer.flush() >= 0
        assert seen == [["a.parquet"]]
        writer.put(PartLabel("b.parquet"), *forward_pass(1))
    assert seen[1] == ["a.parquet", "b.parquet"]


def interrupted(folder: Path, parts: list[PartEntry]) -> None:
    with TraceWriter(folder, LAYOUT, num_domains=3, on_part=parts.append) as writer:
        writer.put(PartLabel("a.parquet"), *forward_pass(0))
        writer.flush()
        writer.put(PartLabel("b.parquet"), *forward_pass(1))
        raise KeyboardInterrupt


def test_after_an_error_outside_no_unfinished_file_and_no_thread_is_left(tmp_path: Path) -> None:
    parts: list[PartEntry] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, parts)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert [part.name for part in parts] == ["a.parquet"]
    assert "trace writer" not in {thread.name for thread in threading.enumerate()}


def put_many(writer: TraceWriter) -> None:
    for number in range(1000):  # more than the queue holds: nothing waits for ever
        writer.put(PartLabel(f"{number}.parquet"), *forward_pass(number))


def test_what_the_thread_could_not_do_is_raised_where_the_model_runs(tmp_path: Path) -> None:
    def full(part: PartEntry) -> None:
        raise OSError(28, "No space left on device")

    writer = TraceWriter(tmp_path, LAYOUT, num_domains=3, on_part=full)
    writer.put(PartLabel("a.parquet"), *forward_pass(0))
    with pytest.raises(OSError, match="No space left"):
        put_many(writer)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert not list(tmp_path.glob(".*"))


def test_the_model_waits_for_a_slow_disk_instead_of_filling_memory(tmp_path: Path) -> None:
    gate = threading.Event()
    writer = TraceWriter(
        tmp_path, LAYOUT, num_domains=3, on_part=lambda part: bool(gate.wait(timeout=20))
    )
    done = []

    def model() -> None:
        for number in range(12):
            writer.put(PartLabel(f"{number}.parquet"), *forward_pass(number))
            done.append(number)

    thread = threading.Thread(target=model)
    thread.start()
    time.sleep(1.0)
    assert len(done) <= 6  # the queue's 4, what the thread has, and what ended the first part
    gate.set()
    thread.join(timeout=20)
    assert len(done) == 12
    writer.close()
    assert len(list(tmp_path.glob("*.parquet"))) == 12


def test_a_batch_of_padding_alone_is_no_row(tmp_path: Path) -> None:
    parts: list[PartEntry] = []
    rows, routings = forward_pass(0)
    nothing = dataclasses.replace(rows, valid_T=np.zeros(10, dtype=bool))
    with TraceWriter(tmp_path, LAYOUT, num_domains=3, on_part=parts.append) as writer:
        writer.put(PartLabel("a.parquet"), nothing, routings)
    assert parts[0].num_tokens == 0
    assert written_rows(tmp_path / "a.parquet") == 0


def written_rows(path: Path) -> int:
    every = {"columns": ("token",), "layers": (0,), "max_rows": 5}
    return sum(batch.num_rows for batch in read_part(path, LAYOUT, **every))


def test_without_pyarrow_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        TraceWriter(tmp_path, LAYOUT, num_domains=3, on_part=lambda part: None)
    assert "trace writer" not in {thread.name for thread in threading.enumerate()}
