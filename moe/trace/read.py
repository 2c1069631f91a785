"""A trace on disk as batches of numpy arrays; without torch.

Opening checks what the trace's JSON says against the files that are there; every part is hashed
before its first row is handed out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.data.manifest import FileEntry
from moe.errors import DataError, nearest
from moe.trace.batch import TraceBatch
from moe.trace.info import PROGRESS_NAME, RANK_NAME, TRACE_NAME, PartEntry, TraceInfo, read_info
from moe.trace.parquet import read_part
from moe.train.atomic_files import Identity, file_identity, hash_file, read_small_file

DEFAULT_MAX_ROWS = 65_536
_AGAIN = "Restore it from a copy, or trace again into another folder."
_VOCABULARY_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace whose JSON is believed, and whose files are there with the sizes that it says."""

    folder: Path
    info: TraceInfo
    _verified: dict[str, Identity] = field(default_factory=dict, repr=False)

    def batches(
        self,
        columns: Sequence[str] | None = None,
        *,
        max_rows: int = DEFAULT_MAX_ROWS,
        layers: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
    ) -> Iterator[TraceBatch]:
        """Yield the rows in order, at most max_rows (and at least one) in each batch.

        columns: names of moe.trace.batch.COLUMNS to read, the others are None; None reads all.
        layers: which of them expert, weight and logit shall have, in this order; None for all.
        steps: of a training run, which recorded steps to read; None for all. Raises DataError
        for names, layers or steps that the trace does not have, and naming a part that is
        damaged; ValueError for max_rows below 1.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows: got {max_rows}; it must be at least 1")
        layout = self.info.layout
        wanted = self._chosen("columns", columns, layout.columns)
        of_layers = self._chosen("layers", layers, range(layout.num_layers))
        parts = self.info.parts
        if steps is not None:
            asked = self._chosen("steps", steps, self.info.steps)
            parts = tuple(part for part in parts if part.step in asked)
        return self._rows(parts, wanted, of_layers, max_rows)

    def verify(self) -> None:
        """Hash every part now. Raises DataError naming the first damaged one."""
        for part in self.info.parts:
            self._verify(part)

    def vocabulary(self) -> tuple[str, ...] | None:
        """The text of every token id; None where the model came without a tokenizer."""
        entry = self.info.vocabulary
        if entry is None:
            return None
        self._verify(entry)
        path = self.folder / entry.name
        return tuple(json.loads(read_small_file(path, limit_bytes=_VOCABULARY_LIMIT_BYTES)))

    def domain_number(self, name: str) -> int:
        """The value of domain_T for a domain. Raises DataError where it has no tokens here."""
        if name not in self.info.domains:
            raise DataError(
                f"domain: got {name!r}; the trace in {self.folder} has: "
                f"{', '.join(self.info.domains)}.{nearest(name, self.info.domains)}"
            )
        number = self.info.domains.index(name)
        if self.info.tokens_of_domain[number] == 0:
            raise DataError(
                f"domain: the trace in {self.folder} has no tokens of {name!r}. Leave it out, or "
                "trace text that has some."
            )
        return number

    def _rows(
        self, parts: Sequence[PartEntry], columns: Sequence[str], layers: Sequence[int],
        max_rows: int,
    ) -> Iterator[TraceBatch]:  # fmt: skip
        for part in parts:
            self._verify(part)
            path = self.folder / part.name
            yield from read_part(
                path, self.info.layout, columns=columns, layers=layers, max_rows=max_rows
            )
            _require_same(path, self._verified[part.name])

    def _verify(self, entry: PartEntry | FileEntry) -> None:
        path = self.folder / entry.name
        try:
            known = self._verified.get(entry.name)
            if known is not None and known == file_identity(path):
                return
            written, identity = hash_file(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}). {_AGAIN}") from None
        if written.sha256 != entry.sha256:
            raise DataError(f"{path}: was changed after it was written. {_AGAIN}")
        self._verified[entry.name] = identity

    def _chosen(self, what: str, asked: Sequence[Any] | None, known: Sequence[Any]) -> list[Any]:
        """What was asked for, all of it where nothing was; DataError for what is not there."""
        chosen = list(known if asked is None else asked)
        unknown = [value for value in chosen if value not in known]
        if unknown or not chosen:
            has = ", ".join(map(str, known)) or "none"
            got = repr(unknown[0]) if unknown else "none of them"
            close = nearest(str(unknown[0]), map(str, known)) if unknown else ""
            raise DataError(f"{what}: got {got}; the trace in {self.folder} has: {has}.{close}")
        return chosen


def open_trace(folder: str | Path) -> Trace:
    """Open the trace of a model over documents, or of a training run as far as it is recorded.

    Raises DataError where there is none, it is not finished, its JSON was changed, or a part is
    missing or has another size.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            f"trace: {str(folder)!r} {what}. Give the folder that launch/trace.py wrote, or "
            "routing/ of a run that recorded its routing."
        )
    trace = Trace(folder, _read(folder))
    vocabulary = trace.info.vocabulary
    for entry in (*trace.info.parts, *((vocabulary,) if vocabulary else ())):
        _check_size(folder / entry.name, entry.num_bytes)
    return trace


def require_same_tokens(first: Trace, second: Trace) -> None:
    """Raise DataError unless both are of the same tokens in order, so that rows can be compared.

    Both are then over the same text, cut, chosen and ordered alike; models and routers may differ.
    """
    for name in ("kind", "data_fingerprint", "domains", "num_tokens"):
        _require_equal(name, getattr(first.info, name), getattr(second.info, name), first, second)
    if first.info.kind == "training":
        raise DataError(
            f"{second.folder}: is of a training run, whose steps see other tokens each. Trace both "
            "models over the same text with launch/trace.py to compare them."
        )
    for key in _WHAT_CHOOSES_TOKENS:
        _require_equal(key, first.info.setting(key), second.info.setting(key), first, second)


_WHAT_CHOOSES_TOKENS = ("split", "domains", "max_tokens", "seq_len", "batch_size")


def _require_equal(name: str, one: Any, other: Any, first: Trace, second: Trace) -> None:
    if one != other:
        raise DataError(
            f"{second.folder}: is not of the same tokens as {first.folder}: {name} is {other!r}, "
            f"and {one!r} there. Trace both models with the same text and numbers."
        )


def _read(folder: Path) -> TraceInfo:
    try:
        return read_info(folder / TRACE_NAME)
    except FileNotFoundError:
        pass  # no trace of documents; perhaps one of a training run, below
    of_ranks = [path for path in sorted(folder.iterdir()) if RANK_NAME.fullmatch(path.name)]
    if of_ranks:
        return _together([read_info(path) for path in of_ranks], of_ranks)
    if (folder / PROGRESS_NAME).exists():
        raise DataError(
            f"trace: the one in {str(folder)!r} is not finished. Start its launch/trace.py command "
            "again: it goes on where it was interrupted."
        )
    raise DataError(
        f"trace: {str(folder)!r} holds no {TRACE_NAME}, so it is no trace. Give the folder that "
        "launch/trace.py wrote, or routing/ of a run that recorded its routing."
    )


def _together(infos: list[TraceInfo], paths: list[Path]) -> TraceInfo:
    """All ranks' parts, by step; a step that some rank has not written yet is left out."""
    first = infos[0]
    for info, path in zip(infos, paths, strict=True):
        if dataclasses.replace(info, parts=(), vocabulary=None) != dataclasses.replace(
            first, parts=(), vocabulary=None
        ):
            raise DataError(
                f"{path}: is of another run than {paths[0].name} beside it. Restore both, or "
                "record into another folder."
            )
    by_step: dict[int, list[PartEntry]] = {}
    for part in (part for info in infos for part in info.parts):
        by_step.setdefault(part.step, []).append(part)
    parts: list[PartEntry] = []
    for _, of_step in sorted(by_step.items()):
        of_step.sort(key=lambda part: part.rank)
        if [part.rank for part in of_step] == list(range(of_step[0].world_size)):
            parts += of_step
    return dataclasses.replace(first, parts=tuple(parts))


def _check_size(path: Path, num_bytes: int) -> None:
    try:
        size = file_identity(path).size
    except FileNotFoundError:
        raise DataError(f"{path}: is missing. {_AGAIN}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). {_AGAIN}") from None
    if size != num_bytes:
        raise DataError(f"{path}: has {size} bytes; it was written with {num_bytes}. {_AGAIN}")


def _require_same(path: Path, verified: Identity) -> None:
    try:
        is_same = file_identity(path) == verified
    except (OSError, ValueError):
        is_same = False
    if not is_same:
        raise DataError(f"{path}: was changed while it was read. {_AGAIN}")
