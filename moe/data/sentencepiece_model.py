"""Writes a SentencePiece BPE model: the bytes of a tokenizer.model with given pieces.

Fields are those of sentencepiece_model.proto; what is not written has its default there.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence

SPACE_MARK = "\u2581"  # stands for a space inside pieces, so it must not reach a model as text
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BPE = 2


def sentencepiece_model(
    pieces: Sequence[str],
    *,
    rank_of: Mapping[int, int],
    control: Collection[int],
    adds_prefix_space: bool,
) -> bytes:
    """The model of pieces by id, spaces as U+2581: <unk>, <s>, </s> first, bytes as <0x41>.

    rank_of: when each piece that is made of two is joined, 0 first. control: ids besides the first
    three that no text becomes.
    """
    never = len(pieces)
    rows = (
        _field(
            1,
            _text(1, piece)
            + _float(2, -rank_of.get(number, never))
            + _kind(number, piece, control),
        )
        for number, piece in enumerate(pieces)
    )
    trainer = _number(3, _BPE) + _number(35, 1)  # model_type, byte_fallback
    normalizer = _text(1, "identity") + _number(3, adds_prefix_space) + _number(4, 0)
    return b"".join([*rows, _field(2, trainer), _field(3, normalizer)])


def is_byte_piece(piece: str) -> bool:
    """Whether a piece stands for one byte."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _kind(number: int, piece: str, control: Collection[int]) -> bytes:
    if number == 0:
        return _number(3, _UNKNOWN)
    if number < 3 or number in control:
        return _number(3, _CONTROL)
    return _number(3, _BYTE if is_byte_piece(piece) else _NORMAL)


def _text(field: int, value: str) -> bytes:
    return _field(field, value.encode())


def _field(field: int, value: bytes) -> bytes:
    return bytes([*_varint(field << 3 | 2), *_varint(len(value))]) + value


def _number(field: int, value: int) -> bytes:
    return bytes([*_varint(field << 3), *_varint(value)])


def _float(field: int, value: float) -> bytes:
    return bytes(_varint(field << 3 | 5)) + struct.pack("<f", value)


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
