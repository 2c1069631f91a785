"""Reading: any cut gives the same rows, damage is named, torch is not needed, memory is bounded."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import DataError
from moe.trace.batch import COLUMNS, TraceBatch, fields_of, join_rows
from moe.trace.info import read_info, write_info
from moe.trace.read import Trace, open_trace, require_same_tokens

REPOSITORY = Path(__file__).parents[3]


def assert_same(one: TraceBatch, other: TraceBatch) -> None:
    assert fields_of(one).keys() == fields_of(other).keys()
    for column, values in fields_of(one).items():
        assert np.array_equal(values, fields_of(other)[column]), column


@pytest.fixture
def copy(traced: Trace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(traced.folder, tmp_path / "copy"))


@settings(max_examples=25, deadline=None)
@given(max_rows=st.integers(1, 3000))
def test_any_largest_batch_gives_the_same_rows(traced: Trace, max_rows: int) -> None:
    batches = list(traced.batches(["token", "expert"], max_rows=max_rows))
    assert all(1 <= batch.num_rows <= max_rows for batch in batches)
    assert_same(join_rows(batches), join_rows(list(traced.batches(["token", "expert"]))))


@settings(max_examples=25, deadline=None)
@given(columns=st.lists(st.sampled_from(COLUMNS[:7]), min_size=1, unique=True))
def test_chosen_columns_are_those_of_the_whole(traced: Trace, columns: list[str]) -> None:
    part = join_rows(list(traced.batches(columns)))
    whole = join_rows(list(traced.batches()))
    assert set(fields_of(part)) == set(columns)
    for column, values in fields_of(part).items():
        assert np.array_equal(values, fields_of(whole)[column])


def test_chosen_layers_come_in_the_order_asked_for(traced: Trace) -> None:
    part = join_rows(list(traced.batches(["expert", "weight", "logit"], layers=[2, 0])))
    whole = join_rows(list(traced.batches()))
    assert np.array_equal(part.expert_TLK, whole.expert_TLK[:, [2, 0]])
    assert np.array_equal(part.weight_TLK, whole.weight_TLK[:, [2, 0]])
    assert np.array_equal(part.logit_TLE, whole.logit_TLE[:, [2, 0]])


def test_an_empty_answer_is_never_given(traced: Trace) -> None:
    with pytest.raises(ValueError, match="max_rows: got 0"):
        traced.batches(max_rows=0)
    with pytest.raises(DataError, match=r"columns: got none of them; .* has: token, position"):
        traced.batches([])
    with pytest.raises(DataError, match=r"columns: got 'experts'; .* Did you mean 'expert'\?"):
        traced.batches(["experts"])
    with pytest.raises(DataError, match=r"layers: got 3; .* has: 0, 1, 2"):
        traced.batches(layers=[3])
    with pytest.raises(DataError, match=r"steps: got 5; .* has: none"):
        traced.batches(steps=[5])


def test_a_trace_without_logits_says_so(trace_it, tmp_path: Path) -> None:
    trace_it(tmp_path / "a", max_tokens=100)
    trace = open_trace(tmp_path / "a")
    assert not trace.info.has_logits
    assert next(trace.batches()).logit_TLE is None
    with pytest.raises(DataError, match="columns: got 'logit'"):
        trace.batches(["logit"])


def read_all(folder: Path) -> None:
    trace = open_trace(folder)
    trace.vocabulary()
    for _ in trace.batches(max_rows=50):
        pass


@pytest.mark.parametrize("place", range(60))
def test_a_flipped_bit_is_found_before_a_row_of_its_part_is_read(copy: Path, place: int) -> None:
    chance = random.Random(place)
    files = sorted(path for path in copy.iterdir() if path.suffix in (".json", ".parquet"))
    path = files[place % len(files)]
    raw = bytearray(path.read_bytes())
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=path.name):
        read_all(copy)


def test_a_part_cut_short_missing_swapped_or_a_link_is_named(copy: Path) -> None:
    first, second = sorted(copy.glob("part-*.parquet"))[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{first.name}: has {len(whole) - 1} bytes; it was"):
        open_trace(copy)
    first.unlink()
    with pytest.raises(DataError, match=f"{first.name}: is missing"):
        open_trace(copy)
    outside = copy.parent / "elsewhere"
    outside.write_bytes(whole)
    first.symlink_to(outside)
    with pytest.raises(DataError, match=f"{first.name}: cannot be read .it is a symbolic link"):
        open_trace(copy)
    first.unlink()
    first.write_bytes(whole)
    changed = second.read_bytes()
    second.write_bytes(whole + b"x" * (len(changed) - len(whole)) if len(changed) >= len(whole)
                       else whole[: len(changed)])  # fmt: skip
    with pytest.raises(DataError, match=f"{second.name}: was changed"):
        open_trace(copy).verify()


def test_a_part_changed_after_it_was_verified_is_found(copy: Path) -> None:
    trace = open_trace(copy)
    trace.verify()
    first = copy / trace.info.parts[0].name
    raw = bytearray(first.read_bytes())
    raw[len(raw) // 2] ^= 1
    first.write_bytes(raw)
    with pytest.raises(DataError, match=f"{first.name}: was changed after it was written"):
        next(trace.batches())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "has schema 2; this version reads 1"),
        ({"kind": "dreams"}, "kind is 'dreams'"),
        ({"num_layers": 0}, "no layers"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(
    copy: Path, changes: dict, message: str
) -> None:
    path = copy / "trace.json"
    write_info(path, dataclasses.replace(read_info(path), **changes))
    with pytest.raises(DataError, match=message):
        open_trace(copy)


@pytest.mark.parametrize("name", ["../part-00000.parquet", "/etc/passwd", "", "a/b"])
def test_a_part_outside_of_the_folder_is_refused(copy: Path, name: str) -> None:
    path = copy / "trace.json"
    info = read_info(path)
    parts = (dataclasses.replace(info.parts[0], name=name), *info.parts[1:])
    write_info(path, dataclasses.replace(info, parts=parts))
    with pytest.raises(DataError, match="not in its folder"):
        open_trace(copy)


def test_an_edited_description_is_refused(copy: Path) -> None:
    path = copy / "trace.json"
    fields = json.loads(path.read_bytes())
    fields["num_experts"] = 6
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"trace.json: was changed after it was written"):
        open_trace(copy)


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no trace.json, so it is no trace"):
        open_trace(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_trace(tmp_path / "nowhere")


def test_domains_are_found_by_name(traced: Trace) -> None:
    assert [traced.domain_number(name) for name in traced.info.domains] == [0, 1, 2]
    with pytest.raises(DataError, match=r"domain: got 'nwes'; .* Did you mean 'news'\?"):
        traced.domain_number("nwes")


def test_two_models_over_the_same_text_can_be_compared(
    traced: Trace, trace_it, make_run, tmp_path: Path
) -> None:
    trace_it(tmp_path / "a", of=make_run(seed=1))
    trace_it(tmp_path / "b", of=make_run(seed=1), seq_len=32)
    other = open_trace(tmp_path / "a")
    require_same_tokens(traced, other)
    one = join_rows(list(traced.batches(["document", "token"])))
    assert_same(one, join_rows(list(other.batches(["document", "token"]))))
    with pytest.raises(DataError, match="is not of the same tokens as"):
        require_same_tokens(traced, open_trace(tmp_path / "b"))


def python(code: str, *arguments: str, cwd: Path) -> str:
    place = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=place, capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


READ = """
import sys
from moe.trace.read import open_trace
print(sum(batch.num_rows for batch in open_trace(sys.argv[1]).batches()))
print([name for name in ("torch", "phi_kernels", "hydra") if name in sys.modules])
"""


def test_a_trace_is_read_without_torch(traced: Trace, tmp_path: Path) -> None:
    out = python(READ, str(traced.folder), cwd=tmp_path)
    assert out.splitlines() == [str(traced.info.num_tokens), "[]"]


# parts written in the documented columns by pyarrow alone; the same rows in every part
MEMORY = """
import dataclasses, hashlib, resource, sys
from pathlib import Path
import numpy as np
from moe.trace.batch import Layout, TraceBatch
from moe.trace.info import PartEntry, TraceInfo, write_info
from moe.trace.parquet import PartFile
from moe.trace.read import open_trace

folder, num_parts = Path(sys.argv[1]), int(sys.argv[2])
layout = Layout(4, 16, 2, False, False)
rng = np.random.default_rng(0)
rows = 131_072
batch = TraceBatch(
    rng.integers(0, 4096, rows).astype(np.int32), np.arange(rows, dtype=np.int32),
    np.arange(rows) // 100, np.zeros(rows, np.int16),
    rng.integers(0, 16, (rows, 4, 2)).astype(np.int16), rng.random((rows, 4, 2), np.float32),
)
parts = []
for number in range(num_parts):
    name = f"part-{number:05d}.parquet"
    file = PartFile(folder / name, layout, row_group_tokens=65_536)
    file.add(batch)
    parts.append(PartEntry(name, *file.finish(), 1, 1, (rows,)))
info = TraceInfo(1, "documents", 4, 16, 2, False, ("a",), "0", "0", "{}", tuple(parts))
write_info(folder / "trace.json", info)
del batch
total = 0
for batch in open_trace(folder).batches():
    total += batch.num_rows
assert total == rows * num_parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    peaks = []
    for num_parts in (1, 16):
        folder = tmp_path / str(num_parts)
        folder.mkdir()
        peaks.append(int(python(MEMORY, str(folder), str(num_parts), cwd=tmp_path)))
    # 15 parts more are 118 MB of arrays; MiB
    assert peaks[1] - peaks[0] < 30, peaks
