"""moe/data/packing.py: windows of a stream, with documents kept apart."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from moe.config import DataConfig, PathsConfig, PrepareConfig, TokenizerConfig
from moe.data.packing import IGNORED, Batch, make_stream, pack
from moe.data.prepare import prepare
from moe.data.shards import TokenSplit, open_split


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    """60 documents of 3 to some 80 tokens in two domains."""
    folder = tmp_path_factory.mktemp("packing")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(400)]
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(60):
            text = f"{number} " + " ".join(generator.choices(words, k=generator.randint(0, 40)))
            file.write(json.dumps({"text": text, "domain": "ab"[number % 2]}) + "\n")
    config = PrepareConfig(
        data=DataConfig(sources=(str(folder / "texts.jsonl"),), validation_fraction=0.1),
        tokenizer=TokenizerConfig(vocab_size=512),
        paths=PathsConfig(data_dir=str(folder / "data")),
        num_processes=1,
    )
    prepare(config, on_progress=lambda what, done, total: None, shard_bytes=1000)
    return open_split(Path(config.paths.data_dir), "train", verify=True)


def packed(split: TokenSplit, seq_len: int) -> tuple[np.ndarray, Batch]:
    """The stream in reverse order as plain numbers, and every window of it, padding included."""
    order = np.arange(split.num_documents)[::-1]
    plain = np.concatenate([split.tokens(d) for d in order]).astype(np.int64)
    windows = np.arange(-(-(len(plain) - 1) // seq_len) + 1)
    streams = [make_stream(split, order)] * len(windows)
    return plain, pack(streams, windows, seq_len=seq_len, sample=windows)


@pytest.mark.parametrize("seq_len", [2, 7, 64, 5000])
def test_inputs_are_the_stream_and_labels_the_next_token(split: TokenSplit, seq_len: int) -> None:
    plain, batch = packed(split, seq_len)
    tokens = batch.tokens.numpy().reshape(-1)
    labels = batch.labels.numpy().reshape(-1)
    assert (tokens[: len(plain) - 1] == plain[:-1]).all()
    # <s> begins a document, so it is the only token that is not predicted from its predecessor
    expected = np.where(plain[1:] == 1, IGNORED, plain[1:])
    assert (labels[: len(plain) - 1] == expected).all()
    assert (labels[len(plain) - 1 :] == IGNORED).all()


@pytest.mark.parametrize("seq_len", [2, 7, 64, 5000])
def test_positions_and_documents_restart(split: TokenSplit, seq_len: int) -> None:
    _, batch = packed(split, seq_len)
    for row in range(len(batch.tokens)):
        tokens, position, document = (
            x[row].tolist() for x in (batch.tokens, batch.position, batch.document)
        )
        number, place = 0, 0
        for column in range(seq_len):
            if document[column] < 0:
                assert position[column] == 0
                continue
            if column and tokens[column] == 1:
                number, place = number + 1, 0
            assert (document[column], position[column]) == (number, place)
            place += 1


def test_a_label_is_always_of_the_document_of_its_input(split: TokenSplit) -> None:
    _, batch = packed(split, 16)
    scored = batch.labels[:, :-1] != IGNORED
    assert (batch.document[:, :-1] == batch.document[:, 1:])[scored].all()
    assert (batch.labels[:, :-1] == batch.tokens[:, 1:])[scored].all()
    # and the other way round: only at the end of a document is there none
    ends = batch.tokens == split.manifest.end_of_text_id
    assert (batch.labels[ends] == IGNORED).all()


def test_domains_are_those_of_the_documents(split: TokenSplit) -> None:
    order = np.arange(split.num_documents)[::-1]
    lengths = split.documents["tokens"][order].astype(np.int64)
    expected = np.repeat(split.documents["domain"][order], lengths)
    _, batch = packed(split, 16)
    found = batch.domain.numpy().reshape(-1)
    assert (found[: len(expected) - 1] == expected[:-1]).all()
    assert {0, 1} <= set(expected.tolist())


def test_what_is_past_the_end_is_padding(split: TokenSplit) -> None:
    plain, batch = packed(split, 16)
    pad = np.arange(batch.tokens.numel()).reshape(batch.tokens.shape) >= len(plain)
    assert pad[-1].all()
    assert (batch.document.numpy()[pad] == -1).all()
    assert (batch.domain.numpy()[pad] == -1).all()
    assert (batch.tokens.numpy()[pad] == split.manifest.end_of_text_id).all()
    assert (batch.document.numpy()[~pad] >= 0).all()


def test_batches_are_64_bit_and_move(split: TokenSplit) -> None:
    _, batch = packed(split, 16)
    moved = batch.to("meta")
    for name in ("tokens", "labels", "position", "document", "domain", "sample"):
        assert str(getattr(batch, name).dtype) == "torch.int64"
        assert getattr(batch, name).is_contiguous()
        assert getattr(moved, name).is_meta
    assert batch.sample.shape == batch.tokens.shape[:1]
