"""Text prepared with a tiktoken ranks file: shards, their type, and a model trained on them."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from moe.config import (
    DataConfig,
    LoggingConfig,
    LoopConfig,
    OptimConfig,
    ParallelConfig,
    PathsConfig,
    PrepareConfig,
    TokenizerConfig,
    TrainConfig,
)
from moe.data import corpus
from moe.data.load_tokenizer import load_tokenizer
from moe.data.prepare import prepare
from moe.data.shards import open_split
from moe.errors import ConfigError, DataError
from moe.model_config import BlockSparseConfig, ModelConfig
from moe.train.metrics import read_metrics
from moe.train.run import run


def write_ranks(path: Path, *, num_ranks: int) -> Path:
    """The bytes, then all pairs of letters and so on, up to num_ranks."""
    letters = b"etaoinshrdlucmfwypvbgkjqxz -.,()"
    longer = (bytes(p) for size in (2, 3, 4) for p in itertools.product(letters, repeat=size))
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += itertools.islice(longer, num_ranks - 256)
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % n for n, t in enumerate(tokens)))
    return path


def settings(folder: Path, *, num_ranks: int, vocab_size: int) -> PrepareConfig:
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(8):
        text = f"document {number}: caf\u00e9 <|end|> and more text of the same kind.\n" * 12
        (texts / f"{number}.txt").write_text(text, encoding="utf-8")
    ranks = write_ranks(folder / f"{num_ranks}.tiktoken", num_ranks=num_ranks)
    return PrepareConfig(
        data=DataConfig(sources=(str(texts),), validation_fraction=0.25),
        tokenizer=TokenizerConfig(vocab_size=vocab_size, model_path=str(ranks)),
        paths=PathsConfig(data_dir=str(folder / "data")),
        num_processes=1,
    )


def silent(*_: object) -> None:
    """Report no progress."""


@pytest.mark.parametrize(
    ("num_ranks", "vocab_size", "dtype"),
    [(400, 512, "uint16"), (65_440, 65_536, "uint16"), (65_441, 65_537, "uint32")],
)
def test_documents_come_back_from_shards_wide_enough_for_the_vocabulary(
    tmp_path: Path, num_ranks: int, vocab_size: int, dtype: str
) -> None:
    config = settings(tmp_path, num_ranks=num_ranks, vocab_size=vocab_size)
    manifest = prepare(config, on_progress=silent)
    assert (manifest.dtype, manifest.vocab_size) == (dtype, vocab_size)
    assert manifest.bos_id == manifest.end_of_text_id == num_ranks + 1
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer.model", vocab_size=vocab_size)
    texts = set()
    for name in ("train", "validation"):
        split = open_split(tmp_path / "data", name, verify=True)
        for number in range(split.num_documents):
            ids = split.tokens(number).tolist()
            assert ids[0] == ids[-1] == num_ranks + 1
            assert max(ids[1:-1]) < num_ranks
            texts.add(tokenizer.decode(ids))
    assert texts == {p.read_text(encoding="utf-8") for p in (tmp_path / "texts").iterdir()}


def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "LEAST_PART_BYTES", 500)
    config = settings(tmp_path, num_ranks=400, vocab_size=512)
    one = prepare(config, on_progress=silent)
    again = dataclasses.replace(
        config, num_processes=2, paths=PathsConfig(data_dir=str(tmp_path / "two"))
    )
    assert prepare(again, on_progress=silent).fingerprint == one.fingerprint


def test_a_vocabulary_too_small_for_the_ranks_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    config = settings(tmp_path, num_ranks=500, vocab_size=595)
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: got 595.*500 ranks.*Use 596"):
        prepare(config, on_progress=silent)
    assert not (tmp_path / "data").exists()


SMALL = ModelConfig(
    name="nano_small", vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, intermediate_size=64, num_experts=0, head_bias=False, tie_embeddings=True,
    feed_forward="gegelu", feed_forward_bias=True, attention_scale=0.125, logit_divisor=8.0,
    embedding_multiplier=10.0, max_position=64,
    block_sparse=BlockSparseConfig(num_local_blocks=2, block_size=4, vertical_stride=2),
)  # fmt: skip


def test_a_small_phi_3_small_learns_from_them_and_masked_text_is_refused(tmp_path: Path) -> None:
    prepare(settings(tmp_path, num_ranks=400, vocab_size=512), on_progress=silent)
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer.model")
    steps = LoopConfig(
        steps=30, batch_size=4, micro_batch_size=4, sample_tokens=4, precision="float32"
    )
    config = TrainConfig(
        name="small",
        model=dataclasses.replace(SMALL, masked_tokens=tokenizer.masked_ids),
        data=DataConfig(seq_len=32),
        optim=OptimConfig(warmup_steps=2, lr=3e-2),
        parallel=ParallelConfig(engine="plain"),
        logging=LoggingConfig(wandb="disabled"),
        train=steps,
        paths=PathsConfig(data_dir=str(tmp_path / "data"), run_dir=str(tmp_path / "run")),
    )
    log = read_metrics(run(config, say=silent).run_dir / "metrics.jsonl")
    losses = [row["loss"] for row in log if row["kind"] == "train"]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(math.log(512 - len(tokenizer.masked_ids)), abs=0.3)
    assert np.mean(losses[-3:]) < losses[0] - 1.0
    wrong = dataclasses.replace(config, model=dataclasses.replace(SMALL, masked_tokens=(7,)))
    with pytest.raises(ConfigError, match=r"model\.masked_tokens: holds 7.*below 400, and 401"):
        run(wrong, say=silent)
