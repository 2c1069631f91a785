"""moe/data/ranks_file.py: a ranks file is read exactly, and every damage is named by its line."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from moe.data.ranks_file import looks_like_ranks, read_ranks
from moe.errors import DataError

TOKENS = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", "é".encode(), b"\n\n"]


def written(tokens: list[bytes], *, first: int = 0) -> bytes:
    lines = [base64.b64encode(t) + f" {r}\n".encode() for r, t in enumerate(tokens, start=first)]
    return b"".join(lines)


def test_a_ranks_file_is_read_and_given_back_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "own.tiktoken"
    path.write_bytes(written(TOKENS))
    ranks = read_ranks(path)
    assert ranks.tokens == tuple(TOKENS)
    assert ranks.rank_of()[b"abc"] == 257
    assert ranks.content() == path.read_bytes()
    assert ranks.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


GOOD = written(TOKENS)
LINES = GOOD.splitlines(keepends=True)


def replaced(number: int, line: bytes) -> bytes:
    """The file with line `number`, from 1, replaced."""
    return b"".join([*LINES[: number - 1], line, *LINES[number:]])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (GOOD[:-1], "line 260: does not end with a newline"),
        (GOOD[:-7], "line 260: does not end with a newline"),
        (GOOD + b"\n", "line 261: got b''"),
        (GOOD + b"the end\n", "line 261: got b'the end'"),
        (replaced(5, b""), "line 5: rank 5 comes too early: ranks are missing"),
        (replaced(5, LINES[4] * 2), "line 6: rank 4 comes again"),
        (replaced(260, b"YWI= 259\n"), "line 260: token b'ab' has rank 256 already"),
        (replaced(7, b"Bg==  6\n"), "line 7: got b'Bg==  6'"),
        (replaced(7, b"Bg== 6 \n"), "line 7: got b'Bg== 6 '"),
        (replaced(7, b"Bg== 06\n"), "line 7: got b'Bg== 06'"),
        (replaced(7, b"Bg== -6\n"), "line 7: got"),
        (replaced(7, b"Bg==\t6\n"), "line 7: got"),
        (replaced(7, b"Bg== 6\r\n"), r"line 7: got b'Bg== 6\\r'"),
        (replaced(7, b"Bg= 6\n"), "line 7: is not base64"),
        (replaced(7, b"B 6\n"), "line 7: is not base64"),
        (replaced(7, b"Bh== 6\n"), "line 7: its base64 has bits after"),
        (replaced(7, b"B\xff== 6\n"), r"line 7: got b'B\\xff=="),
        (replaced(7, b" 6\n"), "line 7: got b' 6'"),
        (replaced(7, b"x" * 10_001 + b" 6\n"), "line 7: its base64|line 7: is not base64"),
        (written(TOKENS[1:]), "no rank for 1 of the 256 bytes, the first 0x00"),
        (written([*TOKENS[:64], b"xy", *TOKENS[65:]]), "first 0x40"),
        (written(TOKENS, first=1), "line 1: rank 1 comes too early"),
    ],
)
def test_damage_is_named_by_its_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.tiktoken.*({reason}).*Copy the file again") as info:
        read_ranks(path)
    assert len(str(info.value)) < 500 + len(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.tiktoken: cannot be read.*model_path"):
        read_ranks(tmp_path / "no.tiktoken")


def test_a_ranks_file_is_told_from_others_by_its_first_line() -> None:
    assert looks_like_ranks(GOOD)
    assert looks_like_ranks(GOOD.replace(b"\n", b"\r\n"))
    for other in (b"", b"\n\x0a\x05<unk>", b'{"model": {}}', b"PK\3\4", b"hello world\n"):
        assert not looks_like_ranks(other)
