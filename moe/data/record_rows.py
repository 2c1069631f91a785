"""The rows of a file of records: JSON lines, a JSON array, a table with a header, or Parquet.

A row is (text, domain or "", key): rows with one key belong together; without an id the key is the
hash of the text. What is wrong with a row is said with its place, by its type.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from moe.data.source_bytes import BUFFER_BYTES, lines_between, opened_source, require_pyarrow
from moe.data.source_files import SourceFile
from moe.errors import DataError

Row = tuple[str, str, str]  # (text, domain or "", key)
OnBad = Callable[[DataError], None]  # raises it, or counts the row
ROW_BYTES = 512 * 2**20  # no record is longer; without a bound one missing line end fills memory
_TYPE_WORDS = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number",
    list: "a list", dict: "an object", str: "a string",
}  # fmt: skip
_SEPARATORS = {"csv": ",", "tsv": "\t"}
_OTHER_TEXTS = ("content", "contents", "raw_content", "body", "document", "article", "code")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
    ("question", "answer"), ("input", "output"), ("prompt", "chosen"),
)  # fmt: skip
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")


class NoTextColumnError(DataError):
    """A file of a folder that is no collection of texts: it is left out, unless it was named."""


class OtherRecordsError(DataError):
    """A record without the field: it is most likely a file of other records, not one bad record."""


def rows_of(
    file: SourceFile, *, start: int, stop: int | None, text_key: str, on_bad: OnBad
) -> Iterator[Row | None]:
    """Yield the rows from start to stop: bytes of plain JSON lines, row groups of Parquet.

    None stands for a row of empty text. A row that cannot be used is given to on_bad. Raises
    DataError for a file that is damaged, NoTextColumnError for a table without the column.
    """
    if file.kind == "parquet":
        found = _parquet_rows(file, start=start, stop=stop, text_key=text_key)
    elif file.kind in ("csv", "tsv"):
        found = _table_rows(file, text_key=text_key)
    else:
        found = _json_rows(file, start=start, stop=stop, on_bad=on_bad, text_key=text_key)
    for place, fields in found:
        try:
            yield _checked(fields, place=place, text_key=text_key)
        except DataError as error:
            on_bad(error)


def is_array(file: SourceFile) -> bool:
    """Whether a file of JSON begins with a square bracket: one array, not lines."""
    with opened_source(file) as stream:
        return _first_character(stream) == b"["


def looks_like_json_lines(raw: bytes, *, text_key: str) -> bool:
    """Whether the first line of a text is a record with text, so the file has the wrong name."""
    line = raw.lstrip()[:ROW_BYTES].split(b"\n", 1)[0]
    if not line.startswith(b"{"):
        return False
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and isinstance(fields.get(text_key), str)


def _json_rows(
    file: SourceFile, *, start: int, stop: int | None, on_bad: OnBad, text_key: str
) -> Iterator[tuple[object, Any]]:
    with opened_source(file) as stream:
        if start == 0:
            first = _first_character(stream)
            if first == b"[":
                yield from _array_elements(file, stream, text_key=text_key)
                return
            if file.kind == "array" and first != b"":
                line = stream.peek(BUFFER_BYTES)[:BUFFER_BYTES].split(b"\n", 1)[0]
                try:
                    fields = json.loads(line.removeprefix(codecs.BOM_UTF8))
                except (ValueError, RecursionError):
                    raise NoTextColumnError(
                        f"{file.path}: is JSON, but neither an array of records nor one record a "
                        f'line; make it like [{{"{text_key}": "..."}}, {{"{text_key}": "..."}}].'
                    ) from None
                _refuse_first(fields, file=file, text_key=text_key)
        yield from _lines(file, stream, start=start, stop=stop, on_bad=on_bad)


def _lines(
    file: SourceFile, stream: io.BufferedReader, *, start: int, stop: int | None, on_bad: OnBad
) -> Iterator[tuple[object, Any]]:
    """The objects of the lines that begin in bytes start to stop."""
    lines = lines_between(stream, start=start, stop=stop, most_bytes=ROW_BYTES)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = _LineNumber(file, start, number)
        try:
            if len(line) == ROW_BYTES:
                raise DataError(f"is longer than {ROW_BYTES >> 20} MiB; no record is.")
            fields = _parsed(line)
        except DataError as error:
            on_bad(DataError(f"{place}: {error}"))
            continue
        yield place, fields


class _LineNumber:
    """Where a line stands; lines before the range are counted only when a message needs it."""

    def __init__(self, file: SourceFile, start: int, number: int) -> None:
        self._file, self._start, self._number = file, start, number

    def __str__(self) -> str:
        number = self._number
        if self._start:
            with open(self._file.path, "rb") as stream:
                before = lines_between(stream, start=0, stop=self._start, most_bytes=ROW_BYTES)
                number += sum(1 for _ in before)
        return f"{self._file.path}, line {number}"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError("is not UTF-8; save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error}); each line must be one object.") from None


def _array_elements(
    file: SourceFile, stream: io.BufferedReader, *, text_key: str
) -> Iterator[tuple[object, Any]]:
    """The elements of a JSON array, one in memory at a time."""
    decoder = json.JSONDecoder()
    text = codecs.getreader("utf-8-sig")(stream)
    held, place, number, size = "", 0, 0, BUFFER_BYTES
    is_open, wants_comma = False, False

    def fill() -> bool:
        nonlocal held, place, size
        more = text.read(size)
        held, place = held[place:] + more, 0
        return bool(more)

    try:
        while True:
            place = _after_space(held, place)
            if place == len(held):
                if not fill():
                    raise DataError(f"{file.path}: ends inside its array; it was cut short.")
                continue
            character = held[place]
            if not is_open:
                is_open, place = True, place + 1
            elif character == "]":
                return
            elif wants_comma:
                if character != ",":
                    raise DataError(
                        f"{file.path}, record {number}: is followed by {character!r}; records of "
                        "an array stand between commas."
                    )
                wants_comma, place = False, place + 1
            else:
                try:
                    fields, end = decoder.raw_decode(held, place)
                    # a number at the end of what is held may go on
                    if end == len(held) and not isinstance(fields, dict | list | str) and fill():
                        continue
                except (ValueError, RecursionError) as error:
                    # half a record, or none at all: more text decides
                    size = min(2 * size, ROW_BYTES)
                    if len(held) - place < ROW_BYTES and fill():
                        continue
                    raise DataError(
                        f"{file.path}, record {number + 1}: is not JSON ({error})."
                    ) from None
                place, number, wants_comma, size = end, number + 1, True, BUFFER_BYTES
                if number == 1:
                    _refuse_first(fields, file=file, text_key=text_key)
                yield f"{file.path}, record {number}", fields
    except UnicodeDecodeError:
        raise DataError(f"{file.path}: is not UTF-8; save the file as UTF-8.") from None


def _refuse_first(fields: Any, *, file: SourceFile, text_key: str) -> None:
    """Say of a .json array whose first element holds no text that it is another kind of file."""
    if file.kind != "array" or (isinstance(fields, dict) and text_key in fields):
        return  # a .jsonl file is records for certain; its row says what is wrong
    try:
        _checked(fields, place=f"{file.path}, record 1", text_key=text_key)
    except DataError as error:
        raise NoTextColumnError(str(error)) from None


def _table_rows(file: SourceFile, *, text_key: str) -> Iterator[tuple[object, Any]]:
    csv.field_size_limit(ROW_BYTES)  # the default refuses texts above 128 KiB
    with opened_source(file) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            table = csv.DictReader(
                lines, delimiter=_SEPARATORS[file.kind], restval=None, strict=True
            )
            names = [name for name in table.fieldnames or [] if name]
            if text_key not in names:
                raise NoTextColumnError(
                    f"{file.path}: has no column {text_key!r} in its first line (found "
                    f"{_listed(names)}).{_other_column(names, text_key)}"
                    f"{_other_separator(names, file.kind, text_key)}"
                )
            for row in table:
                wanted = {name: row.get(name) for name in (text_key, "domain", "id") if name in row}
                for name in ("domain", "id"):
                    wanted[name] = wanted.get(name) or None  # an empty cell is none
                yield f"{file.path}, line {table.line_num}", wanted
        except UnicodeDecodeError:
            raise DataError(f"{file.path}: is not UTF-8; save the file as UTF-8.") from None
        except csv.Error as error:
            raise DataError(f"{file.path}: is not a table that can be read ({error}).") from None
        finally:
            lines.detach()


def _other_separator(names: list[str], kind: str, text_key: str) -> str:
    """What to do where the first line is one column that holds all of them."""
    for separator in (";", "\t", ",", "|"):
        if len(names) == 1 and text_key in [n.strip(' "') for n in names[0].split(separator)]:
            return (
                f" Its columns are separated by {separator!r}; a .{kind} file's are by "
                f"{_SEPARATORS[kind]!r}: save it with these."
            )
    return ""


def row_group_sizes(file: SourceFile) -> list[int]:
    """The bytes of each row group of a Parquet file."""
    metadata = _parquet(file).metadata
    return [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]


def _parquet_rows(
    file: SourceFile, *, start: int, stop: int | None, text_key: str
) -> Iterator[tuple[object, Any]]:
    import pyarrow

    table = _parquet(file)
    schema = table.schema_arrow
    if text_key not in schema.names:
        raise DataError(
            f"{file.path}: has no column {text_key!r} (found {_listed(schema.names)})."
            f"{_other_column(schema.names, text_key)}"
        )
    columns = [name for name in (text_key, "domain", "id") if name in schema.names]
    groups = range(start, table.metadata.num_row_groups if stop is None else stop)
    number = sum(table.metadata.row_group(n).num_rows for n in range(start))
    try:
        for batch in table.iter_batches(128, row_groups=list(groups), columns=columns):
            for fields in batch.to_pylist():
                number += 1
                yield f"{file.path}, row {number}", fields
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.path}: is damaged ({error}); copy it again.") from None


def _parquet(file: SourceFile) -> Any:
    require_pyarrow(file.path)
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file.path}: is not a Parquet file, or it is damaged ({error}); copy it again."
        ) from None


def _checked(fields: Any, *, place: object, text_key: str) -> Row | None:
    if not isinstance(fields, dict):
        raise DataError(
            f'{place}: is {_type_word(fields)}; it has no "{text_key}". Each record must be like '
            f'{{"{text_key}": "...", "domain": "news", "id": "7"}}; domain and id may be left out.'
        )
    text, domain, key = fields.get(text_key), fields.get("domain"), fields.get("id")
    if not isinstance(text, str):
        if text_key not in fields:
            raise OtherRecordsError(
                f'{place}: has no "{text_key}" (found {_listed(list(fields))}).'
                f"{_way_out(fields, text_key)}"
            )
        raise DataError(f'{place}: "{text_key}" is {_type_word(text)}; it must be a string.')
    if domain is not None and (not isinstance(domain, str) or not domain):
        raise DataError(f'{place}: "domain" is {domain!r}; it must be a string, not empty.')
    if key is not None and not isinstance(key, str | int):
        raise DataError(f'{place}: "id" is {key!r}; it must be a string or a whole number.')
    if not text.strip():
        return None
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()
        f"{domain}{key}".encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: has half of a surrogate pair (such as \\ud800), which is not text; "
            "remove it or replace it by \\ufffd."
        ) from None
    return text, domain or "", digest if key is None else str(key)


def _way_out(fields: dict[str, Any], text_key: str) -> str:
    """What can be done about a record without text, by what it has instead."""
    for name in _CONVERSATIONS:
        if isinstance(fields.get(name), list):
            return (
                f' "{name}" is a conversation, and this command takes plain text: write its turns '
                f'one after another into one "{text_key}".'
            )
    for first, second in _PAIRS:
        if first in fields and second in fields:
            return (
                f' "{first}" and "{second}" are a question and its answer, and this command takes '
                f'plain text: write both one after the other into one "{text_key}".'
            )
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    return _other_column(texts, text_key) or (
        f' Each record must be like {{"{text_key}": "...", "domain": "news", "id": "7"}}; domain '
        "and id may be left out."
    )


def _other_column(names: list[str], text_key: str) -> str:
    """The key to set where the text has one of its usual other names."""
    for name in ("text", *_OTHER_TEXTS):
        if name in names and name != text_key:
            return f" If the text is in {name!r}, set data.text_key={name}."
    return ""


def _first_character(stream: io.BufferedReader) -> bytes:
    """The first byte that is no space or byte order mark, without moving the stream."""
    return stream.peek(BUFFER_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _after_space(text: str, place: int) -> int:
    match = _WHITE_SPACE.match(text, place)
    return match.end() if match else place


def _type_word(value: object) -> str:
    word = _TYPE_WORDS.get(type(value), f"a {type(value).__name__}")
    shown = f" ({value!r})" if isinstance(value, int | float) else ""
    return word + shown


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12])
    return (shown + ", ..." if len(names) > 12 else shown) or "nothing"
