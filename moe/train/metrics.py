"""Where the numbers of a run go: records, the metrics.jsonl file, and several sinks at once.

A record is a flat dictionary whose keys are grouped by "/" (loss/balance, router/entropy_L). Every
sink receives the same records; progress.py and wandb_sink.py hold the other two sinks.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe.errors import DataError, UserError
from moe.train.atomic_files import sync_folder

Record = dict[str, Any]  # values: float, int, bool, str, or (nested) lists of them

METRICS_FILE = "metrics.jsonl"

_NON_FINITE_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MAY_BE_NON_FINITE = re.compile(rb'"(?:nan|-?inf)"')
_HEAD = re.compile(rb'\{"step": (\d+)[,}]')  # as JsonlSink.write begins a line


class Sink(Protocol):
    """Something that takes records; may_fail says that training goes on without it."""

    may_fail: bool

    def write(self, step: int, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One line of strict JSON for each record, on disk before write returns.

    resume_step None starts a new file; one that is already there is kept as <name>.old. A number
    continues the file: lines of later steps, and a last line torn by a kill, are cut off, so that
    no step is ever in the file twice; a damaged line before them goes by an atomic replacement. NaN
    and infinities, which JSON lacks, become the strings "nan", "inf" and "-inf".
    """

    may_fail = False

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size:
                if resume_step is None:
                    os.replace(self.path, self.path.with_name(self.path.name + ".old"))
                else:
                    _drop_lines_after(self.path, resume_step)
            # unbuffered: a line is one write to the operating system, and survives a kill
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def write(self, step: int, record: Record) -> None:
        """Append the record as a line that starts with its step; UserError if the disk is full."""
        values = {"step": int(step), **{k: v for k, v in record.items() if k != "step"}}
        line = json.dumps(_to_json(values), allow_nan=False, separators=(", ", ": ")) + "\n"
        length_before = os.fstat(self._file.fileno()).st_size
        remaining = line.encode()
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) or 0 :]
        except OSError as error:
            self._cut_back_to(length_before)
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file; further writes are a mistake of the caller."""
        self._file.close()

    def _cut_back_to(self, length: int) -> None:
        try:
            self._file.truncate(length)
        except OSError:  # a device, or a disk beyond repair: reopening drops the torn line
            return


class Sinks:
    """Several sinks that look like one.

    A sink with may_fail that raises is reported once by a warning and left out from then on. The
    others raise, after every sink has had the record.
    """

    may_fail = False

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    def write(self, step: int, record: Record) -> None:
        """Hand the record to every sink that still works."""
        self._for_each(lambda sink: sink.write(step, record))

    def close(self) -> None:
        """Close every sink, also those after one whose close fails."""
        self._for_each(lambda sink: sink.close())

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _for_each(self, action: Any) -> None:
        first_error: Exception | None = None
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                if sink.may_fail:
                    self._sinks.remove(sink)
                    warnings.warn(
                        f"{type(sink).__name__} stopped working and is left out for the rest of "
                        f"the run; training goes on. Cause: {type(error).__name__}: {error}",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                else:
                    first_error = first_error or error
        if first_error is not None:
            raise first_error


def read_metrics(path: str | Path) -> list[Record]:
    """All records of stream_metrics at once: 100,000 steps of a large model take 2 GB."""
    return list(stream_metrics(path))


def stream_metrics(path: str | Path) -> Iterator[Record]:
    """Yield the records of a metrics.jsonl, the strings "nan", "inf", "-inf" as floats again.

    One pass that holds one line, also of a file that grows meanwhile. A last line torn by a kill is
    left out. Raises DataError for a missing file and for any other line that is not a record.
    """
    path = Path(path)
    try:
        for number, line in enumerate(_lines(path), start=1):
            record = _parse(line)
            if record is not None:
                yield _from_json(record) if _MAY_BE_NON_FINITE.search(line) else record
            elif _is_damaged(line):
                raise DataError(
                    f"{path}: line {number} is not a record of a run (one JSON object with a "
                    "step). Restore the file, or delete that line."
                )
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Give the metrics.jsonl of a run folder."
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _drop_lines_after(path: Path, resume_step: int) -> None:
    # all ranks wait for this: one pass, which parses only what looks odd
    position = end = 0  # in the file, and of the lines at its beginning that stay as they are
    for line in _lines(path):
        position += len(line)
        kept = _kept(line, resume_step)
        if kept == line and end + len(line) == position:
            end = position
        elif kept or (kept is None and _is_damaged(line)):
            _write_kept(path, resume_step)
            return
    if end < position:
        os.truncate(path, end)


def _write_kept(path: Path, resume_step: int) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for number, line in enumerate(_lines(path), start=1):
            kept = _kept(line, resume_step)
            if kept is not None:
                file.write(kept)
            elif _is_damaged(line):
                warnings.warn(
                    f"{path}: line {number} is damaged and was dropped.",
                    RuntimeWarning,
                    stacklevel=4,
                )
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def _is_damaged(line: bytes) -> bool:
    """Whether a line without a record is worth a word; a torn last one is what a kill leaves."""
    return line.endswith(b"\n") and bool(line.strip())


def _kept(line: bytes, resume_step: int) -> bytes | None:
    """The whole line, nothing where its step is after resume_step, None where it has no step."""
    head = _HEAD.match(line)
    # records are flat, so one pair of braces at both ends is one record
    if head is not None and line.endswith(b"}\n") and line.count(b"{") == 1 and b"\0" not in line:
        step = int(head[1])
    else:
        record = _parse(line)
        if record is None:
            return None
        step = record["step"]
    if step > resume_step:
        return b""
    return line if line.endswith(b"\n") else line + b"\n"


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Sequence):
        return [_to_json(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, arrays and numbers alike
        return _to_json(value.tolist())
    raise TypeError(f"a record cannot hold {value!r} of type {type(value).__name__}")


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE_WORDS.get(value, value)
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    return value


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}). Everything written before is "
        "kept. Free disk space or choose another folder with paths.run_dir, then start the same "
        "command again to resume."
    )
