"""The bytes of a source file as a stream, unpacked where it is .gz, .bz2, .xz or .zst."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from moe.data.source_files import SourceFile
from moe.errors import DataError

BUFFER_BYTES = 2**20


@contextmanager
def opened_source(file: SourceFile) -> Iterator[io.BufferedReader]:
    """A buffered stream of the unpacked bytes. Raises DataError for a file that is damaged.

    A plain file's stream can seek; only the part that is read is ever in memory.
    """
    try:
        with _open(file) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, error) from None
    except OSError as error:
        # the decompressors raise it without a number
        if error.errno is None:
            raise _damaged(file, error) from None
        raise DataError(f"{file.path}: cannot be read ({error.strerror}).") from None


def lines_between(
    stream: io.BufferedReader, *, start: int, stop: int | None, most_bytes: int
) -> Iterator[bytes]:
    """Yield the lines that begin in bytes start to stop; one too long ends after most_bytes.

    start > 0 needs a stream that can seek.
    """
    place = start
    if start:
        # a line that begins before belongs to the range before
        stream.seek(start - 1)
        place += len(stream.readline()) - 1
    while stop is None or place < stop:
        line = stream.readline(most_bytes)
        if not line:
            return
        place += len(line)
        yield line


def require_pyarrow(path: str) -> None:
    """Raise DataError where the package that unpacks .zst and reads Parquet is missing."""
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: the package pyarrow is not installed; .zst and .parquet cannot be read "
            "without it. Install it with: pip install pyarrow"
        ) from None


def _open(file: SourceFile) -> io.BufferedReader:
    if file.compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(file.path), BUFFER_BYTES)  # type: ignore[arg-type]
    if file.compression == ".bz2":
        return io.BufferedReader(bz2.BZ2File(file.path), BUFFER_BYTES)  # type: ignore[arg-type]
    if file.compression == ".xz":
        return io.BufferedReader(lzma.LZMAFile(file.path), BUFFER_BYTES)  # type: ignore[arg-type]
    if file.compression == ".zst":
        require_pyarrow(file.path)
        import pyarrow

        packed = pyarrow.OSFile(file.path)
        return io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"), BUFFER_BYTES)
    return io.BufferedReader(io.FileIO(file.path), BUFFER_BYTES)


def _damaged(file: SourceFile, error: Exception) -> DataError:
    return DataError(f"{file.path}: is damaged or was cut short ({error}); copy it again.")
