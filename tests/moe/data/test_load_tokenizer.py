"""moe/data/load_tokenizer.py: the content decides, and what is neither is refused by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from moe.convert.tokenizer_json import sentencepiece_json
from moe.data.load_tokenizer import load_tokenizer, reads_ids_of
from moe.data.tiktoken_tokenizer import TiktokenTokenizer
from moe.data.tokenizer import Tokenizer
from moe.data.tokenizer_training import train_tokenizer
from moe.errors import DataError

RANKS = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    train_tokenizer(
        ["some text to learn from, and then some more. " * 20],
        vocab_size=290,
        output_path=tmp_path / "other.tiktoken",
    )
    ranks = load_tokenizer(tmp_path / "tokenizer.model", vocab_size=400)
    pieces = load_tokenizer(str(tmp_path / "other.tiktoken"), vocab_size=300)
    assert isinstance(ranks, TiktokenTokenizer)
    assert isinstance(pieces, Tokenizer)
    assert (ranks.vocab_size, pieces.vocab_size) == (400, 300)
    assert pieces.bos_id == 1
    assert ranks.bos_id == ranks.end_of_text_id == 257
    for tokenizer in (ranks, pieces):
        assert tokenizer.model_bytes() == Path(tokenizer._path).read_bytes()
        assert tokenizer.decode(tokenizer.encode(" some text\n")) == " some text\n"


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04" * 20])
def test_a_file_of_neither_kind_is_named_with_both(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wrong.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"wrong\.bin.*SentencePiece.*tiktoken") as info:
        load_tokenizer(tmp_path / "wrong.bin")
    assert ("is empty" in str(info.value)) == (not content)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.model", tmp_path):
        with pytest.raises(DataError, match=rf"{path.name}: cannot be read.*SentencePiece.*tiktok"):
            load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(RANKS[:-9], "line 256|no rank"), (b"\n\x05junk" * 100, "not a SentencePiece model")],
)
def test_a_damaged_file_of_one_kind_is_refused_as_that_kind(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "damaged").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_tokenizer(tmp_path / "damaged")


def test_the_vocabulary_is_checked_for_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_bytes(RANKS)
    with pytest.raises(DataError, match=r"vocab_size: got 351.*96 special tokens.*Use 352"):
        load_tokenizer(tmp_path / "ranks", vocab_size=351)


def test_the_same_vocabulary_in_another_file_reads_the_same_ids(
    tmp_path: Path, short_documents: Path
) -> None:
    own = load_tokenizer(short_documents / "tokenizer.model")
    assert isinstance(own, Tokenizer)
    whole = sentencepiece_json(own)
    word = whole["added_tokens"][-1] | {"id": 512, "content": "<think>"}
    other = {**whole["added_tokens"][-1], "content": "<|other|>"}
    loaded = []
    for added in (whole["added_tokens"], [*whole["added_tokens"], word],
                  [*whole["added_tokens"][:-1], other]):  # fmt: skip
        (tmp_path / "x.json").write_text(json.dumps({**whole, "added_tokens": added}))
        loaded.append(load_tokenizer(tmp_path / "x.json"))
    same, more, changed = loaded
    assert same.sha256 != own.sha256
    assert reads_ids_of(same, own)
    assert reads_ids_of(own, same)
    assert reads_ids_of(more, own)  # its own text may hold the word, which the other has not
    assert not reads_ids_of(own, more)
    assert not reads_ids_of(changed, own)
