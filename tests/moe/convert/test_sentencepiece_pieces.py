"""moe/convert/sentencepiece_pieces.py: the pieces are those that sentencepiece reads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece

from moe.convert.sentencepiece_pieces import BYTE, CONTROL, NORMAL, UNKNOWN, Piece, read_pieces
from moe.data.tokenizer_training import train_tokenizer
from moe.errors import DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path: Path = tmp_path_factory.mktemp("pieces") / "own.model"
    train_tokenizer(["d\u00e9f some(text): more\n" * 50], vocab_size=300, output_path=path)
    return path.read_bytes()


def test_every_piece_is_as_sentencepiece_reads_it(model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    expected = []
    for number in range(processor.get_piece_size()):
        kind = NORMAL
        kind = UNKNOWN if processor.is_unknown(number) else kind
        kind = CONTROL if processor.is_control(number) else kind
        kind = BYTE if processor.is_byte(number) else kind
        expected.append(Piece(processor.id_to_piece(number), processor.get_score(number), kind))
    assert read_pieces(model) == expected
    assert {piece.kind for piece in expected} == {NORMAL, UNKNOWN, CONTROL, BYTE}


def test_damaged_bytes_are_refused_or_read_but_never_crash(model: bytes) -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(model[: rng.randint(1, len(model))])
        for _ in range(rng.randint(0, 5)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read_pieces(bytes(damaged))
        except DataError:
            refused += 1
    assert refused > 100
