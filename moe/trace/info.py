"""What the JSON of a trace says: its shape, where it comes from, and its parts.

trace.json is written last, so a folder with one holds a whole trace; progress.json stands in its
place before. Ranks of a training run have one each (trace.rank_00000.json), brought up to date
as it grows and before every checkpoint. Each seals itself with a SHA-256 and holds the SHA-256 of
every part.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe.config_from_dict import from_dict
from moe.data.manifest import FileEntry
from moe.errors import ConfigError, DataError
from moe.trace.batch import Layout
from moe.train.atomic_files import read_small_file, replace_file

SCHEMA_VERSION = 1
TRACE_NAME = "trace.json"
PROGRESS_NAME = "progress.json"
VOCABULARY_NAME = "vocabulary.json"
RANK_NAME = re.compile(r"trace\.rank_([0-9]{5,})\.json")
KINDS = ("documents", "training")
_LIMIT_BYTES = 256 * 2**20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class PartEntry:
    """One Parquet file of a trace, and what recording it cost."""

    name: str
    num_bytes: int
    sha256: str
    num_batches: int  # forward passes whose tokens it holds, all of each
    num_documents: int
    tokens_of_domain: tuple[int, ...]
    step: int = 0  # training: the step it was recorded in
    rank: int = 0
    world_size: int = 1
    forward_seconds: float = 0.0  # of the model alone
    handover_seconds: float = 0.0  # the model waited for its routing to be taken
    writer_seconds: float = 0.0  # of one core, beside the model

    @property
    def num_tokens(self) -> int:
        """Rows of the file."""
        return sum(self.tokens_of_domain)


@dataclass(frozen=True)
class TraceInfo:
    """A trace: its shape, where it comes from, its parts.

    kind "documents": a model in evaluation mode over documents of a prepared folder, each from its
    start; document_T numbers them as they are stored there. kind "training": what the tokens of
    recorded steps took; a document is there what a window holds of one, so position_T counts
    from the window's start where the document goes on, and document_T is window * seq_len + its
    number in the window. settings is JSON text: what the trace was asked for and of what.
    model_sha256: of the parameters and what decides the routing; of a training run, which changes
    its parameters, of its id and configuration.
    """

    schema_version: int
    kind: str
    num_layers: int
    num_experts: int
    top_k: int
    has_logits: bool
    domains: tuple[str, ...]
    model_sha256: str
    data_fingerprint: str
    settings: str
    parts: tuple[PartEntry, ...] = ()
    vocabulary: FileEntry | None = None  # the text of every token id, to show tokens by

    @property
    def layout(self) -> Layout:
        """The shape of its arrays."""
        is_training = self.kind == "training"
        return Layout(self.num_layers, self.num_experts, self.top_k, self.has_logits, is_training)

    @property
    def num_tokens(self) -> int:
        """Rows."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_documents(self) -> int:
        """Different values of document_T in each step, summed."""
        return sum(part.num_documents for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Size of the parts on disk."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def tokens_of_domain(self) -> tuple[int, ...]:
        """Rows of each domain, in the order of `domains`."""
        columns = (tuple(part.tokens_of_domain[d] for part in self.parts)
                   for d in range(len(self.domains)))  # fmt: skip
        return tuple(sum(column) for column in columns)

    @property
    def steps(self) -> tuple[int, ...]:
        """The recorded steps of a training run, ascending; empty for documents."""
        return tuple(sorted({part.step for part in self.parts})) if self.layout.has_steps else ()

    @property
    def forward_seconds(self) -> float:
        """What the model alone took."""
        return sum(part.forward_seconds for part in self.parts)

    @property
    def overhead(self) -> float:
        """Seconds of recording a second of the model, where both take them from the same cores.

        The model's waiting and all of the writing thread's CPU time: an upper bound, as the thread
        also uses cores that the model leaves idle. 0 where nothing was measured.
        """
        spent = sum(part.handover_seconds + part.writer_seconds for part in self.parts)
        return spent / self.forward_seconds if self.forward_seconds > 0 else 0.0

    def setting(self, name: str) -> Any:
        """One value of settings; None where there is none of that name."""
        return json.loads(self.settings).get(name)


def rank_name(rank: int) -> str:
    """The name of a rank's JSON in the trace of a training run."""
    return f"trace.rank_{rank:05d}.json"


def write_info(path: Path, info: TraceInfo) -> None:
    """Write info with its seal, whole or not at all."""
    fields = asdict(info)
    fields["seal"] = _seal(fields)
    replace_file(path, json.dumps(fields, indent=1, sort_keys=True).encode() + b"\n")


def read_info(path: Path) -> TraceInfo:
    """Read and check what write_info wrote. Raises DataError, FileNotFoundError without a file."""
    try:
        fields = json.loads(read_small_file(path, limit_bytes=_LIMIT_BYTES))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is damaged ({error}). {_AGAIN}") from None
    version = fields.get("schema_version") if isinstance(fields, dict) else fields
    if type(version) is not int or version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: has schema {reprlib.repr(version)}; this version reads {SCHEMA_VERSION}. "
            "Read it with the version that wrote it, or trace again into another folder."
        )
    seal = fields.pop("seal", None)
    if seal != _seal(fields):
        raise DataError(f"{path}: was changed after it was written. {_AGAIN}")
    try:
        info = from_dict(TraceInfo, fields)
        _check(info)
    except (ConfigError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {error} {_AGAIN}") from None
    return info


_AGAIN = "Restore the file from a copy, or trace again into another folder."


def _check(info: TraceInfo) -> None:
    if info.kind not in KINDS:
        raise ValueError(f"kind is {info.kind!r}; allowed: {', '.join(KINDS)}.")
    if min(info.num_layers, info.num_experts, info.top_k) < 1:
        raise ValueError("it has no layers, experts or choices.")
    files = [part.name for part in info.parts]
    files += [info.vocabulary.name] if info.vocabulary else []
    for name in files:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"it names the file {name!r}, which is not in its folder.")
    if len(set(files)) != len(files):
        raise ValueError("it names a file twice.")
    for part in info.parts:
        counts = (part.num_bytes, part.num_batches, *part.tokens_of_domain)
        if min(counts) < 0 or len(part.tokens_of_domain) != len(info.domains):
            raise ValueError(f"what it says of {part.name} is not consistent.")
    if not isinstance(json.loads(info.settings), dict):
        raise ValueError("settings is not a JSON object.")


def _seal(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
