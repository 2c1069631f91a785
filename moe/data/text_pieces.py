"""What a text file's documents are: the whole file, or pieces of a long one, cut at line ends."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator

PIECE_BYTES = 16 * 2**20  # a longer text is several documents, so that memory has a bound
LINE_BYTES = 2**20  # how far the end of a line is looked for; else the cut is between characters


def num_pieces(num_bytes: int) -> int:
    """How many pieces a file of so many bytes has."""
    return max(1, -(-num_bytes // PIECE_BYTES))


def pieces(stream: io.BufferedReader, *, first: int, stop: int | None) -> Iterator[bytes]:
    """Yield the bytes of pieces first to stop (None: all) of a stream.

    Piece n ends at the first line end from (n + 1) * PIECE_BYTES on, so where it lies does not
    depend on where reading begins; first > 0 needs a stream that can seek.
    """
    place = 0
    if first:
        place = first * PIECE_BYTES
        stream.seek(place)
        place += _cut(stream.read(LINE_BYTES), 0)
        stream.seek(place)
    number, held = first, b""
    while stop is None or number < stop:
        target = (number + 1) * PIECE_BYTES - place
        held += stream.read(max(0, target + LINE_BYTES - len(held)))
        is_last = len(held) <= target
        end = len(held) if is_last else _cut(held, target)
        if end:
            yield held[:end]
        if is_last:
            return
        held, place, number = held[end:], place + end, number + 1


def decoded(raw: bytes) -> tuple[str | None, str]:
    """(text, "") of UTF-8 with its line ends as they are, or (None, why it is left out)."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _looks_like_utf16(raw):
        return None, "UTF-16: save it as UTF-8"
    if b"\0" in raw:
        return None, "binary"
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    return (text, "") if text.strip() else (None, "empty")


def cut_end(text: str, *, fraction: float) -> tuple[str, str]:
    """Cut text so that about the last fraction is apart: at a line end, else a space, else there.

    The second part is empty where the text is too short to give one.
    """
    place = int(len(text) * (1 - fraction))
    for mark in ("\n", " "):
        after = text.find(mark, place) + 1
        before = text.rfind(mark, 0, place) + 1
        # the nearer one, unless it leaves nothing on its side
        near = sorted(
            (abs(cut - place), cut)
            for cut in (after, before)
            if text[:cut].strip() and text[cut:].strip()
        )
        # far from the place, another mark is better than another fraction
        if near and near[0][0] <= max(1, min(place, len(text) - place) // 2):
            return text[: near[0][1]], text[near[0][1] :]
    if text[:place].strip() and text[place:].strip():
        return text[:place], text[place:]
    return text, ""


def _cut(held: bytes, target: int) -> int:
    """Where the piece that holds byte target ends: after a line end, else before a character."""
    line_end = held.find(b"\n", target, target + LINE_BYTES)
    if line_end >= 0:
        return line_end + 1
    for place in range(target, min(target + 4, len(held))):
        if held[place] & 0xC0 != 0x80:  # not inside a character
            return place
    return min(target, len(held))


def _looks_like_utf16(raw: bytes) -> bool:
    """Text of mostly Latin letters without a mark: every second byte is zero."""
    start = raw[:4096]
    half = len(start) // 2
    return (
        half >= 8
        and any(
            start[side::2].count(0) > 0.7 * half and start[1 - side :: 2].count(0) < 0.05 * half
            for side in (0, 1)
        )
        and re.search(rb"[\n ]", start) is not None
    )
