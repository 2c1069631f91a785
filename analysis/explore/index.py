"""What the page looks up of a trace, counted once and kept in one file beside the trace.

explore-<hash>.safetensors, named by the hashes of all that it was counted from; opened lazily, so
that a page reads the layer that it shows. A damaged one is made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.count_trace import TraceCounts, count_steps, count_trace, gathered
from analysis.explore.examples import EXAMPLE_COLUMNS, Examples, collect_examples
from analysis.explore.leads import LeadCounts, count_leads, lead_unit
from analysis.routing_counts import RoutingCounts
from moe.config_from_dict import from_dict
from moe.errors import ConfigError, DataError
from moe.trace.batch import TraceBatch
from moe.trace.info import TraceInfo
from moe.trace.read import Trace
from moe.train.atomic_files import remove_anyway, replace_file

INDEX_SCHEMA = 1  # raise it when what is counted, or how, changes
INDEX_NAME = re.compile(r"explore-[0-9a-f]{16}\.safetensors")
_ROWS = 2**17

# told what is done, rows so far and rows in all
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class TraceIndex:
    """An index on disk; every lookup reads what it needs. Letters as in analysis.count_trace."""

    path: Path
    info: TraceInfo  # without its parts
    num_tokens: int
    num_documents: int
    steps: tuple[int, ...]
    _file: Any = dataclasses.field(repr=False)

    def array(self, name: str) -> NDArray:
        """A whole array of the index."""
        return self._file.get_tensor(name)

    def of_layer(self, name: str, layer: int) -> NDArray:
        """One layer of an array whose first axis is layers."""
        return self._file.get_slice(name)[layer : layer + 1][0]

    def has(self, name: str) -> bool:
        """Whether it was counted."""
        return name in self._file.keys()  # noqa: SIM118 (not a mapping)

    @cached_property
    def routing(self) -> RoutingCounts:
        """Counts of all tokens."""
        return RoutingCounts(
            *(self.array(f"routing/{name}") for name in _ROUTING), num_choices=self.info.top_k
        )

    @cached_property
    def vocabulary(self) -> tuple[str, ...] | None:
        """The text of every token id; None where the trace has none."""
        if not self.has("vocabulary"):
            return None
        return tuple(json.loads(self.array("vocabulary").tobytes()))

    def examples(self, layer: int) -> Examples:
        """Those of one layer; their first axis has length 1."""
        names = [field.name for field in dataclasses.fields(Examples)]
        return Examples(**{n: self.of_layer(f"examples/{n}", layer)[None] for n in names})


_ROUTING = ("choice_LDGE", "token_DG", "choice_LKE", "weight_LE")


def index_name(info: TraceInfo) -> str:
    """The file name of a trace's index: another trace, or another version, has another."""
    vocabulary = info.vocabulary.sha256 if info.vocabulary else ""
    seen = [
        INDEX_SCHEMA, info.model_sha256, info.data_fingerprint, info.settings, vocabulary,
        info.domains, info.layout, [(part.name, part.sha256, part.step) for part in info.parts],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    return f"explore-{digest[:16]}.safetensors"


def find_index(folder: Path, info: TraceInfo) -> TraceIndex | None:
    """The index of this trace in a folder, if it is there, whole."""
    try:
        return open_index(folder / index_name(info))
    except DataError:
        return None


def open_index(path: Path) -> TraceIndex:
    """Open and verify an index. Raises DataError where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), framework="np")
        about = file.metadata() or {}
        if about.pop("sha256", None) != _digest_of(file, about):
            raise ValueError("was changed after it was written")
        info = from_dict(TraceInfo, json.loads(about["info"]))
        tokens, documents = int(about["num_tokens"]), int(about["num_documents"])
    except (OSError, SafetensorError, ConfigError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: is no whole index ({error}). Remove it and start again."
        ) from None
    steps = tuple(file.get_tensor("steps").tolist())
    return TraceIndex(path, info, tokens, documents, steps, file)


def build_index(trace: Trace, folder: Path, *, on_progress: OnProgress) -> TraceIndex:
    """Count a trace, write its index to a folder, whole or not at all, and open it.

    Older indexes of the folder go. Raises DataError for a trace without tokens, damaged parts, and
    rows outside the ranges that the trace says; OSError where the folder cannot be written.
    """
    from safetensors.numpy import save

    arrays = {name: _stored(array) for name, array in _count(trace, on_progress).items()}
    info = trace.info
    about = {
        "info": json.dumps(dataclasses.asdict(dataclasses.replace(info, parts=()))),
        "num_tokens": str(info.num_tokens),
        "num_documents": str(info.num_documents),
    }
    about["sha256"] = _digest(((name, arrays[name]) for name in sorted(arrays)), about)
    path = folder / index_name(info)
    replace_file(path, save(arrays, metadata=about))
    for old in folder.iterdir():
        if INDEX_NAME.fullmatch(old.name) and old != path:
            remove_anyway(old)
    return open_index(path)


def _count(trace: Trace, on_progress: OnProgress) -> dict[str, NDArray]:
    """Every array of the index, by name."""
    info = trace.info
    if not info.num_tokens:
        raise DataError(f"trace: the one in {trace.folder} has no tokens; trace some text first.")
    vocabulary = trace.vocabulary()
    vocab_size = len(vocabulary) if vocabulary is not None else _highest_token(trace) + 1
    counts = count_trace(_Watched(trace, "counting", on_progress), vocab_size=vocab_size)  # type: ignore[arg-type]
    arrays = _arrays_of(counts)
    columns = (*EXAMPLE_COLUMNS, "step") if info.layout.has_steps else EXAMPLE_COLUMNS
    columns = (*columns, "logit") if info.has_logits else columns
    leads: list[LeadCounts] = []
    rows = _Watched(trace, "examples", on_progress).batches(columns, max_rows=_ROWS)
    rows = _led(gathered(rows, num_rows=_ROWS), info, leads)
    found = collect_examples(rows, num_layers=info.num_layers, num_experts=info.num_experts)
    arrays |= {f"examples/{name}": value for name, value in vars(found).items()}
    if leads:
        arrays["lead_LE"], arrays["lead_token_LE"] = leads[0].lead_LE, leads[0].token_LE
    arrays["steps"] = np.array(info.steps, np.int64)
    if info.steps:
        by_step = count_steps(_Watched(trace, "steps", on_progress))  # type: ignore[arg-type]
        of_steps = [by_step[step] for step in info.steps]
        arrays["steps/load_SLDE"] = np.stack([c.load_LDE for c in of_steps])
        arrays["steps/weight_SLE"] = np.stack([c.weight_LE for c in of_steps])
    if vocabulary is not None:
        text = json.dumps(vocabulary, ensure_ascii=False).encode(errors="replace")
        arrays["vocabulary"] = np.frombuffer(text, np.uint8)
    return arrays


def _arrays_of(counts: TraceCounts) -> dict[str, NDArray]:
    assert counts.tokens is not None
    arrays = {f"routing/{name}": getattr(counts.routing, name) for name in _ROUTING}
    return arrays | {
        "pairs/pair_LEE": counts.pairs.pair_LEE,
        "positions/choice_LXE": counts.positions.choice_LXE,
        "positions/token_X": counts.positions.token_X,
        "tokens/choice_LXE": counts.tokens.choice_LXE,
        "tokens/token_X": counts.tokens.token_X,
    }


def _led(
    batches: Iterator[TraceBatch], info: TraceInfo, leads: list[LeadCounts]
) -> Iterator[TraceBatch]:
    """The same batches, counting their leads into `leads`, without the logits from there on."""
    is_counted = lead_unit(info.layout) is not None
    for batch in batches:
        if is_counted:
            part = count_leads(batch, num_experts=info.num_experts)
            leads[:] = [leads[0] + part if leads else part]
        yield batch._replace(logit_TLE=None)


class _Watched:
    """A trace that says how far it was read."""

    def __init__(self, trace: Trace, what: str, on_progress: OnProgress) -> None:
        self.info = trace.info
        self._trace, self._what, self._on_progress = trace, what, on_progress

    def batches(self, columns: Any = None, *, max_rows: int) -> Iterator[TraceBatch]:
        done, total = 0, self.info.num_tokens
        for batch in self._trace.batches(columns, max_rows=max_rows):
            yield batch
            done += batch.num_rows
            self._on_progress(self._what, done, total)


def _highest_token(trace: Trace) -> int:
    highest = 0
    for batch in trace.batches(("token",)):
        highest = max(highest, int(batch.token_T.max(initial=0)))
    return highest


def _stored(array: NDArray) -> NDArray:
    """Contiguous, and counts in 32 bits where they fit: half the file, half the reading."""
    if array.dtype == np.int64 and array.size > 1024 and array.min() >= 0 and array.max() < 2**31:
        array = array.astype(np.int32)
    return np.ascontiguousarray(array)


def _digest_of(file: Any, about: dict[str, str]) -> str:
    return _digest(((name, file.get_tensor(name)) for name in sorted(file.keys())), about)


def _digest(arrays: Iterator[tuple[str, NDArray]], about: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in arrays:
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()
