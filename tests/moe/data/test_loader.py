"""moe/data/loader.py: one stream for any number of readers and workers, every token once."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe.data.loader
from moe.config import DataConfig, PathsConfig, PrepareConfig, TokenizerConfig
from moe.data.loader import (
    TrainingRows,
    evaluated_bytes,
    evaluated_documents,
    evaluation_batches,
    training_batches,
)
from moe.data.packing import IGNORED, Batch, Stream, pack
from moe.data.prepare import prepare
from moe.data.shards import TokenSplit, open_split
from moe.data.tokenizer import Tokenizer
from moe.errors import ConfigError, DataError

NAMES = ("tokens", "labels", "position", "document", "domain", "sample")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 short documents in three domains of different size."""
    folder = tmp_path_factory.mktemp("loader")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(400)]
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(120):
            text = f"{number} " + " ".join(generator.choices(words, k=generator.randint(5, 60)))
            domain = "law" if number < 10 else "news" if number < 40 else "code"
            file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    config = PrepareConfig(
        data=DataConfig(sources=(str(folder / "texts.jsonl"),), validation_fraction=0.3),
        tokenizer=TokenizerConfig(vocab_size=512),
        paths=PathsConfig(data_dir=str(folder / "data")),
        num_processes=1,
    )
    prepare(config, on_progress=lambda what, done, total: None, shard_bytes=4000)
    return folder / "data"


@pytest.fixture(scope="module")
def train(data_dir: Path) -> TokenSplit:
    return open_split(data_dir, "train", verify=True)


@pytest.fixture(scope="module")
def validation(data_dir: Path) -> TokenSplit:
    return open_split(data_dir, "validation", verify=True)


def steps(split: TokenSplit, **changes: Any) -> Iterator[list[Batch]]:
    arguments: dict[str, Any] = {
        "seed": 3, "seq_len": 32, "batch_size": 8, "micro_batch_size": 2, "start_step": 0,
        "num_steps": 30, "rank": 0, "world_size": 1, "num_workers": 0,
    }  # fmt: skip
    return training_batches(split, **{**arguments, **changes})


def stream_hash(split: TokenSplit, *, world_size: int, **changes: Any) -> str:
    """SHA-256 of every field of all ranks' rows, in the order of the samples."""
    ranks = [steps(split, rank=r, world_size=world_size, **changes) for r in range(world_size)]
    digest = hashlib.sha256()
    for groups in zip(*ranks, strict=True):
        batches = [batch for group in groups for batch in group]
        order = torch.cat([batch.sample for batch in batches]).argsort()
        for name in NAMES:
            rows = torch.cat([getattr(batch, name) for batch in batches])[order]
            digest.update(rows.numpy().tobytes())
    return digest.hexdigest()


def test_the_stream_is_the_same_for_any_readers_and_workers(train: TokenSplit) -> None:
    expected = stream_hash(train, world_size=1)
    for world_size in (1, 2, 4):
        assert stream_hash(train, world_size=world_size) == expected
    for num_workers in (1, 2):
        assert stream_hash(train, world_size=1, num_workers=num_workers) == expected
    assert stream_hash(train, world_size=1, micro_batch_size=8) == expected
    assert stream_hash(train, world_size=1, seed=4) != expected


def test_a_rank_reads_its_rows_of_each_micro_batch(train: TokenSplit) -> None:
    for rank in range(2):
        step = next(iter(steps(train, rank=rank, world_size=2, start_step=5)))
        samples = [batch.sample.tolist() for batch in step]
        first = 5 * 8
        assert samples == [
            [first + (m * 2 + rank) * 2, first + (m * 2 + rank) * 2 + 1] for m in range(2)
        ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resuming_is_the_same_as_running_through(train: TokenSplit, num_workers: int) -> None:
    whole = list(steps(train))
    resumed = list(steps(train, start_step=17, num_steps=13, num_workers=num_workers))
    assert len(resumed) == 13
    for group, again in zip(whole[17:], resumed, strict=True):
        for batch, other in zip(group, again, strict=True):
            for name in NAMES:
                assert torch.equal(getattr(batch, name), getattr(other, name))


def test_no_global_generator_is_touched(train: TokenSplit) -> None:
    torch.manual_seed(1)
    before, before_numpy = torch.get_rng_state(), repr(np.random.get_state())
    state = random.getstate()
    for num_workers in (0, 1):
        list(steps(train, num_steps=3, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert repr(np.random.get_state()) == before_numpy
    assert random.getstate() == state


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_predicts_every_token_but_the_first_once(train: TokenSplit, epoch: int) -> None:
    seq_len = 32
    source = TrainingRows(train, seed=3, seq_len=seq_len, batch_size=1)
    predicted: Counter[int] = Counter()
    num_labels = 0
    for sample in range(epoch * source.num_windows, (epoch + 1) * source.num_windows):
        labels = source.rows(sample, np.array([0])).labels
        predicted.update(labels[labels != IGNORED].tolist())
        num_labels += int((labels != IGNORED).sum())
    everything: Counter[int] = Counter()
    for document in range(train.num_documents):
        everything.update(train.tokens(document)[1:].tolist())
    left = everything - predicted
    assert not predicted - everything  # nothing twice
    assert left.total() == everything.total() - num_labels
    assert left.total() < seq_len
    assert 1 not in predicted


def test_each_epoch_has_its_own_order(train: TokenSplit) -> None:
    source = TrainingRows(train, seed=3, seq_len=32, batch_size=1)
    size = source.num_windows
    rows = [
        [tuple(source.rows(e * size + n, np.array([0])).tokens[0].tolist()) for n in range(size)]
        for e in range(2)
    ]
    assert rows[0] != rows[1]
    # documents are joined anew, so even the windows as a set differ
    assert len(set(rows[0]) & set(rows[1])) < size / 4


def test_each_epoch_visits_its_windows_in_its_own_order(
    train: TokenSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: list[list[int]] = []

    def record(streams: list[Stream], windows: np.ndarray, **arguments: Any) -> Batch:
        visited.append(windows.tolist())
        return pack(streams, windows, **arguments)

    monkeypatch.setattr(moe.data.loader, "pack", record)
    size = TrainingRows(train, seed=3, seq_len=32, batch_size=1).num_windows
    source = TrainingRows(train, seed=3, seq_len=32, batch_size=size)
    for epoch in range(3):
        source.rows(epoch, np.arange(size))
    assert all(sorted(order) == list(range(size)) for order in visited)
    assert len({tuple(order) for order in [*visited, list(range(size))]}) == 4


def test_a_batch_does_not_hold_one_file(train: TokenSplit) -> None:
    group = next(iter(steps(train, batch_size=16, micro_batch_size=16)))
    assert len(set(group[0].tokens[:, 5].tolist())) > 4
    plain = [train.tokens(d) for d in range(train.num_documents)]
    found = set()
    for row in group[0].tokens.numpy():
        text = row.astype(train.shards[0].dtype).tobytes()[10:40]
        found |= {d for d, ids in enumerate(plain) if text in ids.tobytes()}
    assert len(found) > 5


def test_a_step_may_cross_epochs_even_of_one_window(train: TokenSplit) -> None:
    seq_len = train.num_tokens - 1
    group = next(iter(steps(train, seq_len=seq_len, batch_size=4, micro_batch_size=4)))
    assert group[0].sample.tolist() == [0, 1, 2, 3]
    for row in group[0].labels:
        assert int((row != IGNORED).sum()) == train.num_tokens - train.num_documents
    assert len({tuple(row.tolist()) for row in group[0].tokens}) == 4


def test_too_little_text_for_a_window_says_what_to_set(train: TokenSplit) -> None:
    with pytest.raises(
        DataError,
        match=rf"data\.seq_len: got {train.num_tokens};.*data\.seq_len={train.num_tokens - 1}",
    ):
        steps(train, seq_len=train.num_tokens)


def test_a_batch_that_ranks_cannot_share_is_refused(train: TokenSplit) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: got 8"):
        steps(train, world_size=3)


def evaluated(split: TokenSplit, **changes: Any) -> list[Batch]:
    arguments: dict[str, Any] = {"seq_len": 32, "batch_size": 4, "max_tokens": 0}
    return list(evaluation_batches(split, **{**arguments, **changes}))


@pytest.mark.parametrize("max_tokens", [0, 1, 500])
def test_an_evaluation_predicts_its_documents_once(validation: TokenSplit, max_tokens: int) -> None:
    documents = evaluated_documents(validation, max_tokens=max_tokens)
    expected: Counter[tuple[int, int]] = Counter()
    for document in documents:
        domain = int(validation.documents["domain"][document])
        expected.update((domain, token) for token in validation.tokens(document)[1:].tolist())
    found: Counter[tuple[int, int]] = Counter()
    for batch in evaluated(validation, max_tokens=max_tokens):
        assert batch.tokens.shape == (4, 32)
        scored = batch.labels != IGNORED
        found.update(zip(batch.domain[scored].tolist(), batch.labels[scored].tolist(), strict=True))
    assert found == expected


def test_a_budget_covers_every_domain_with_whole_documents(validation: TokenSplit) -> None:
    everything = evaluated_documents(validation, max_tokens=0)
    assert sorted(everything.tolist()) == list(range(validation.num_documents))
    few = evaluated_documents(validation, max_tokens=500)
    assert few.tolist() == everything[: len(few)].tolist()
    assert set(validation.documents["domain"][few].tolist()) == {0, 1, 2}
    tokens = validation.documents["tokens"].astype(int)
    assert tokens[few[:-1]].sum() < 500 <= tokens[few].sum()
    tiny = evaluated_documents(validation, max_tokens=1)
    assert sorted(validation.documents["domain"][tiny].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("max_tokens", [0, 500])
def test_bytes_are_those_of_the_evaluated_text(
    validation: TokenSplit, data_dir: Path, max_tokens: int
) -> None:
    tokenizer = Tokenizer.load(data_dir / "tokenizer.model", vocab_size=512)
    expected = dict.fromkeys(validation.domains, 0)
    for batch in evaluated(validation, max_tokens=max_tokens):
        for number, name in enumerate(validation.domains):
            labels = batch.labels[(batch.domain == number) & (batch.labels != IGNORED)]
            # the words are ASCII, so the pieces' texts can be counted one by one
            expected[name] += sum(len(tokenizer.decode([i])) for i in labels.tolist())
    assert evaluated_bytes(validation, max_tokens=max_tokens) == expected


def test_ranks_share_an_evaluation_in_equally_many_batches(validation: TokenSplit) -> None:
    whole = [row for batch in evaluated(validation) for row in zip_rows(batch)]
    parts = [evaluated(validation, rank=rank, world_size=3) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    rows = [row for part in parts for batch in part for row in zip_rows(batch)]
    assert sorted(r for r in rows if r[0] >= 0) == sorted(r for r in whole if r[0] >= 0)
    for part in parts:
        for batch in part:
            padded = batch.sample < 0
            assert (batch.document[padded] == -1).all()
            assert (batch.labels[padded] == IGNORED).all()


def zip_rows(batch: Batch) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (int(sample), tuple(labels.tolist()))
        for sample, labels in zip(batch.sample, batch.labels, strict=True)
    ]


def test_a_stream_that_fills_its_windows_exactly_has_no_row_without_labels(
    validation: TokenSplit,
) -> None:
    documents = evaluated_documents(validation, max_tokens=0)
    total = int(validation.documents["tokens"][documents].sum())
    seq_len = next(n for n in range(2, total) if (total - 1) % n == 0)
    batches = evaluated(validation, seq_len=seq_len, batch_size=7)
    rows = (total - 1) // seq_len
    real = sum(int((batch.document >= 0).any(dim=1).sum()) for batch in batches)
    assert real == rows
    assert sum(int((batch.sample >= 0).sum()) for batch in batches) == rows


def test_readers_are_refused_at_once_where_shared_memory_is_full(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(moe.data.loader.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(moe.data.loader, "_SHARED_MEMORY", data_dir)
    split = open_split(data_dir, "train", verify=False)
    of_run = {
        "seed": 0, "seq_len": 8, "batch_size": 4, "micro_batch_size": 4, "start_step": 0,
        "num_steps": 1, "rank": 0, "world_size": 1,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"data.num_workers: got 2, .* Use data.num_workers=0"):
        training_batches(split, **of_run, num_workers=2)
    assert len(list(training_batches(split, **of_run, num_workers=0))) == 1
