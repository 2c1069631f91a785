"""What a *.tiktoken file says: the bytes of each rank, one base64 token and its rank a line."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from moe.errors import DataError

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (0|[1-9][0-9]{0,8})")
SHOWN = 60  # bytes of a wrong line in a message
_COPY_AGAIN = "Copy the file again, or make one with a line `base64 rank` for each token."


@dataclass(frozen=True)
class Ranks:
    """tokens[r] is the bytes of rank r; the lower rank merges first."""

    path: Path
    tokens: tuple[bytes, ...]
    sha256: str

    def rank_of(self) -> dict[bytes, int]:
        """The rank of each token."""
        return {token: rank for rank, token in enumerate(self.tokens)}

    def content(self) -> bytes:
        """The file that was read; its form allows no other."""
        lines = (
            base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.tokens)
        )
        return b"".join(lines)


def looks_like_ranks(content: bytes) -> bool:
    """Whether the first line is one of a ranks file."""
    return _LINE.fullmatch(content[:4096].partition(b"\n")[0].rstrip(b"\r")) is not None


def read_ranks(path: Path) -> Ranks:
    """Read and check every line.

    Raises DataError with the line's number where one is no base64 token and rank, where ranks do
    not count up from 0 by one, where a token comes twice, or where one of the 256 bytes is missing.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); it must be a tiktoken ranks file, such as "
            "cl100k_base.tiktoken. Set tokenizer.model_path."
        ) from None
    if not content:
        raise DataError(f"{path}: is empty; it must be a tiktoken ranks file. {_COPY_AGAIN}")
    if not content.endswith(b"\n"):
        raise DataError(
            f"{path}, line {content.count(10) + 1}: does not end with a newline, so the file may "
            f"be cut off. {_COPY_AGAIN}"
        )
    rank_of: dict[bytes, int] = {}
    for number, line in enumerate(content[:-1].split(b"\n"), start=1):
        token, rank = _parse(line, where=f"{path}, line {number}")
        if rank != number - 1:
            problem = "comes again" if rank < number - 1 else "comes too early: ranks are missing"
            raise DataError(
                f"{path}, line {number}: rank {rank} {problem}. The ranks count up from 0 with the "
                f"lines, so this line's is {number - 1}. {_COPY_AGAIN}"
            )
        if token in rank_of:
            raise DataError(
                f"{path}, line {number}: token {token[:SHOWN]!r} has rank {rank_of[token]} "
                f"already. {_COPY_AGAIN}"
            )
        rank_of[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in rank_of]
    if missing:
        raise DataError(
            f"{path}: has no rank for {len(missing)} of the 256 bytes, the first 0x{missing[0]:02X}"
            f", so some text would be lost. {_COPY_AGAIN}"
        )
    return Ranks(path, tuple(rank_of), hashlib.sha256(content).hexdigest())


def _parse(line: bytes, *, where: str) -> tuple[bytes, int]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise DataError(
            f"{where}: got {line[:SHOWN]!r}; it must be a token in base64, one space, and its "
            f"rank. {_COPY_AGAIN}"
        )
    try:
        token = base64.b64decode(match.group(1), validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: is not base64 ({error}). {_COPY_AGAIN}") from None
    if base64.b64encode(token) != match.group(1):
        raise DataError(f"{where}: its base64 has bits after the token's end. {_COPY_AGAIN}")
    return token, int(match.group(2))
