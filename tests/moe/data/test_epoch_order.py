"""moe/data/epoch_order.py: blocks of a long table hold every token once, mixed, in no memory."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from large_folder import NUM_DOMAINS, make_large_folder

import moe.data.epoch_order
from moe.data.epoch_order import epoch_order, stream_fingerprint
from moe.data.loader import TrainingRows, training_batches
from moe.data.packing import IGNORED, Batch
from moe.data.permutation import permuted, random_key, shuffled
from moe.data.shards import TokenSplit, open_split
from moe.errors import DataError


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of more than 100 documents are long."""
    monkeypatch.setattr(moe.data.epoch_order, "MOST_WHOLE", 100)


def lengths_of(num_documents: int) -> np.ndarray:
    """2 to 24 tokens, as any machine and version of numpy computes them."""
    return 2 + np.arange(num_documents) ** 2 % 23


def small(folder: Path, num_documents: int = 3000) -> TokenSplit:
    make_large_folder(folder, lengths_of(num_documents), num_shards=7, has_tokens=True)
    return open_split(folder, "train", verify=False)


def epoch_of(split: TokenSplit, *, seq_len: int, seed: int = 0, epoch: int = 0) -> Batch:
    size = epoch_order(split, seq_len=seq_len).num_windows
    rows = TrainingRows(split, seed=seed, seq_len=seq_len, batch_size=size)
    return rows.rows(epoch, np.arange(size))


# 4369 and 31: segments that end with the stream, and streams that end with their last window
@pytest.mark.parametrize(
    ("num_documents", "seq_len"),
    [(3000, 16), (3000, 31), (3000, 2), (301, 16), (302, 16), (400, 64), (150, 200), (4369, 7)],
)
def test_every_token_is_predicted_once_from_the_one_before(
    tmp_path: Path, in_blocks: None, num_documents: int, seq_len: int
) -> None:
    split = small(tmp_path / "data", num_documents)
    batch = epoch_of(split, seq_len=seq_len)
    scored = batch.labels != IGNORED
    assert (batch.labels[scored] == (batch.tokens[scored] + 1) % 2**16).all()
    begin_D = np.cumsum(lengths_of(num_documents)) - lengths_of(num_documents)
    wanted = np.setdiff1d(np.arange(split.num_tokens), begin_D)
    found = np.sort(batch.labels[scored].numpy())
    assert split.num_tokens < 2**16
    assert len(np.unique(found)) == len(found)
    missing = np.setdiff1d(wanted, found)
    assert np.isin(found, wanted).all()
    assert len(missing) < seq_len


def test_tokens_of_a_row_keep_their_place_and_domain(tmp_path: Path, in_blocks: None) -> None:
    split = small(tmp_path / "data")
    batch = epoch_of(split, seq_len=16)
    document_T = np.repeat(np.arange(split.num_documents), lengths_of(3000))
    assert (split.documents["domain"][document_T[batch.tokens]] == batch.domain.numpy()).all()
    same = (batch.document[:, 1:] == batch.document[:, :-1]).numpy()
    step = (batch.tokens[:, 1:] - batch.tokens[:, :-1]).numpy()
    assert (step[same] == 1).all()
    assert (batch.position[:, 1:].numpy() == np.where(same, batch.position[:, :-1] + 1, 0)).all()


def test_a_domain_that_lies_in_one_place_is_spread_over_the_epoch(
    tmp_path: Path, in_blocks: None
) -> None:
    split = small(tmp_path / "data", 60_000)
    batch = epoch_of(split, seq_len=32)
    whole = np.bincount(batch.domain.flatten(), minlength=NUM_DOMAINS) / batch.domain.numel()
    for tenth in np.array_split(batch.domain.numpy(), 10):
        share = np.bincount(tenth.flatten(), minlength=NUM_DOMAINS) / tenth.size
        # 2,400 rows of some 3 documents each: a standard deviation is about 0.003
        assert np.abs(share - whole).max() < 0.02
    # and a row holds several: of 20 equal ones drawn freely, neighbours are alike once in 20
    new = (batch.document[:, 1:] != batch.document[:, :-1]).numpy()
    alike = (batch.domain[:, 1:] == batch.domain[:, :-1]).numpy()[new].mean()
    assert alike < 0.15


def test_seeds_and_epochs_have_orders_of_their_own(tmp_path: Path, in_blocks: None) -> None:
    split = small(tmp_path / "data")
    orders = [
        epoch_of(split, seq_len=16, seed=seed, epoch=epoch).tokens.numpy()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (2, 0))
    ]
    sets = [{row.tobytes() for row in order} for order in orders]
    for number, order in enumerate(orders):
        for other in range(number):
            assert (order[:, 0] == orders[other][:, 0]).mean() < 0.01
            assert len(sets[number] & sets[other]) < len(order) / 10  # joined anew, too


def test_the_order_in_blocks_is_fixed_for_all_time(tmp_path: Path, in_blocks: None) -> None:
    batch = epoch_of(small(tmp_path / "data"), seq_len=16, seed=3, epoch=2)
    assert batch.tokens[:8, 0].tolist() == [12102, 25401, 25337, 10077, 15330, 4693, 18670, 6040]
    digest = hashlib.sha256(batch.labels.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "370c9920c739dd25"


def test_a_short_table_keeps_the_order_of_earlier_versions(tmp_path: Path) -> None:
    split, epoch, seq_len = small(tmp_path / "data"), 1, 16
    order = shuffled(split.num_documents, key=random_key(3, "documents", epoch))
    stream = np.concatenate([split.tokens(d) for d in order])
    size = (len(stream) - 1) // seq_len
    window = permuted(np.arange(size), size=size, key=random_key(3, "windows", epoch))
    expected = stream[window[:, None] * seq_len + np.arange(seq_len)]
    assert (epoch_of(split, seq_len=seq_len, seed=3, epoch=epoch).tokens.numpy() == expected).all()
    assert stream_fingerprint(split) == split.manifest.fingerprint


def test_a_long_table_has_another_fingerprint_than_before(tmp_path: Path, in_blocks: None) -> None:
    split = small(tmp_path / "data")
    assert stream_fingerprint(split) != split.manifest.fingerprint
    assert len(stream_fingerprint(split)) == 64


@pytest.mark.parametrize("column", ["offset", "tokens", "domain", "shard"])
def test_a_row_that_is_wrong_is_found_when_it_is_read(
    tmp_path: Path, in_blocks: None, column: str
) -> None:
    split = small(tmp_path / "data")
    table = np.load(split.table_path)
    table[column][1500] += 1000
    np.save(split.table_path, table)
    with pytest.raises(DataError, match=r"train\.documents\.npy: does not agree"):
        epoch_of(split, seq_len=16)


@pytest.fixture(scope="module")
def long_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 million documents in 1,100 shards, 60 MB of table."""
    folder = tmp_path_factory.mktemp("long") / "data"
    lengths = np.full(2 * 10**6, 6)
    return make_large_folder(folder, lengths, num_shards=1100, has_tokens=True)


READ = """
import resource, sys
import numpy as np
from moe.data.loader import TrainingRows
from moe.data.shards import open_split

def private_megabytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
before = private_megabytes()
open_split(sys.argv[1], "validation", verify=False)
split = open_split(sys.argv[1], "train", verify=False)
rows = TrainingRows(split, seed=0, seq_len=64, batch_size=16)
for epoch in range(3):
    rows.rows(epoch * (rows.num_windows // 16), np.arange(16))
for step in range(20):
    rows.rows(step, np.arange(16))
print(split.num_documents, private_megabytes() - before)
"""


def test_memory_and_descriptors_do_not_grow_with_documents_and_shards(long_table: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(long_table)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    documents, megabytes = done.stdout.split()
    assert int(documents) == 2 * 10**6
    assert float(megabytes) < 25  # the table has 60, and its order and ends took 32 more


def test_workers_read_a_long_table_as_the_rank_itself_does(long_table: Path) -> None:
    arguments: dict[str, Any] = {
        "seed": 0, "seq_len": 64, "batch_size": 16, "start_step": 7, "num_steps": 3,
    }  # fmt: skip
    split = open_split(long_table, "train", verify=False)
    alone = training_batches(
        split, micro_batch_size=16, rank=0, world_size=1, num_workers=0, **arguments
    )
    ranks = [
        training_batches(
            split, micro_batch_size=4, rank=r, world_size=2, num_workers=r, **arguments
        )
        for r in range(2)
    ]
    for (whole,), *parts in zip(alone, *ranks, strict=True):
        rows = {
            int(sample): row.tolist()
            for part in parts
            for batch in part
            for sample, row in zip(batch.sample, batch.tokens, strict=True)
        }
        assert rows == {
            int(s): row.tolist() for s, row in zip(whole.sample, whole.tokens, strict=True)
        }


OPEN = """
import sys, time
import numpy as np
from moe.data.loader import TrainingRows
from moe.data.shards import open_split

began = time.monotonic()
split = open_split(sys.argv[1], "train", verify=False)
opened = time.monotonic()
rows = TrainingRows(split, seed=0, seq_len=4096, batch_size=16)
rows.rows(0, np.arange(1))
first_row = time.monotonic()
lines = open("/proc/self/status").read().splitlines()  # rusage has the parent's peak, too
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
print(split.num_documents, opened - began, first_row - opened, peak)
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_million_documents_in_five_thousand_shards_open_in_a_gigabyte(
    tmp_path: Path,
) -> None:
    """`pytest -m long -s` of this file prints seconds; the folder takes 3 GB, its tokens none."""
    folder = tmp_path / "data"
    make_large_folder(folder, np.full(10**8, 700, dtype=np.int32), num_shards=5000)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, timeout=600
    )
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    documents, opened, first_row, megabytes = map(float, done.stdout.split())
    print(
        f"{documents:,.0f} documents, 5,000 shards: opened in {opened:.1f} s, first row in "
        f"{first_row:.1f} s, at most {megabytes:,.0f} MB"
    )
    assert documents == 10**8
    assert megabytes < 1000
