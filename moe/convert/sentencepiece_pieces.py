"""What a SentencePiece file says of each piece: its text, its score, and what kind it is."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from moe.errors import DataError

# SentencePiece.Type in sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


class Piece(NamedTuple):
    """One row of the vocabulary; the higher score merges first."""

    text: str
    score: float
    kind: int


def read_pieces(model: bytes) -> list[Piece]:
    """The pieces of a serialised ModelProto in the order of their ids.

    Raises DataError for bytes that are no such message.
    """
    try:
        return [_piece(value) for field, value in _fields(memoryview(model)) if field == 1]
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise DataError(
            "tokenizer.model: is not a SentencePiece model, or it is damaged."
        ) from None


def _piece(message: int | memoryview) -> Piece:
    parts = {} if isinstance(message, int) else dict(_fields(message))
    text, score, kind = parts[1], parts.get(2, b"\0\0\0\0"), parts.get(3, NORMAL)
    if isinstance(text, int) or isinstance(score, int) or not isinstance(kind, int):
        raise ValueError
    return Piece(bytes(text).decode(), struct.unpack("<f", score)[0], kind)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field: an int, or the bytes of the other wire types."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if wire == _LENGTH:
            size, place = _varint(message, place)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError
        if place + size > len(message):
            raise ValueError
        yield number, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError
