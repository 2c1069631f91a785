"""Record the routing of a training run's steps, on every rank, into routing/ of the run folder.

    trace.rank_00000.json               each rank's recorded steps; replaced as they grow
    step_00000100.rank_00000.parquet    what one rank's tokens of one step took
    vocabulary.json                     the text of every token id

The tokens are those that router/load_LE of the training log counts, padding left out, with the
experts that were really used: sampled ones, for SparseMixer. A run that goes on from a checkpoint
drops the steps after it, which are recorded again. One file a rank and recorded step: 1,000 steps
on 8 ranks are 8,000 files, on 512 half a million in one folder, which is for a larger
train.trace_every.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from moe.config import TrainConfig
from moe.data.manifest import FileEntry, Manifest
from moe.data.packing import Batch
from moe.errors import DataError, UserError
from moe.parallel.processes import Processes
from moe.sparse.router import Routing
from moe.trace.info import (
    RANK_NAME,
    SCHEMA_VERSION,
    VOCABULARY_NAME,
    PartEntry,
    TraceInfo,
    rank_name,
    read_info,
    write_info,
)
from moe.trace.write import ROW_GROUP_TOKENS, PartLabel, Rows, TraceWriter
from moe.train.atomic_files import hash_file, make_folder, remove_anyway, replace_file, sync_folder

ROUTING_FOLDER = "routing"  # of a run folder
# A rank's JSON is replaced when it has grown by this share, and before a checkpoint: all of its
# writings together are then some times its last length, not its square.
_GROWTH = 1 / 8


class TrainingRecorder:
    """Every rank has one; the loop calls `record` for each micro-batch of a step, then `end_step`.

    A context manager: left normally, every ended step is on the disk. Making one is done by all
    ranks together; afterwards no rank waits for another.
    """

    def __init__(
        self,
        folder: Path,
        info: TraceInfo,
        *,
        processes: Processes,
        resume_step: int,
        vocabulary: bytes | None = None,
    ) -> None:
        """resume_step: the step that the run goes on from; what was recorded after it is dropped.

        Raises DataError on every rank where the folder holds the routing of another run, or
        cannot be written.
        """
        self._folder = Path(folder)
        self._rank, self._world_size = processes.rank, processes.world_size
        problem = ""
        if processes.is_first:
            try:
                _prepare(self._folder, info, resume_step=resume_step, vocabulary=vocabulary)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{self._folder}: cannot be written ({error.strerror or error})."
        problem = processes.from_first(problem)
        if problem:
            raise DataError(problem)
        self._path = self._folder / rank_name(self._rank)
        self._info = read_info(self._path) if self._path.exists() else info
        self._num_listed = len(self._info.parts)  # in the JSON on the disk
        self._writer = TraceWriter(
            self._folder, info.layout, num_domains=len(info.domains), on_part=self._add
        )

    def record(self, step: int, batch: Batch, routings: Sequence[Routing]) -> float:
        """Take one micro-batch of a step; returns the seconds that training waited for it.

        step: optimiser steps done after this one, as in the log. batch: on the CPU, as it came
        from the loader; routings: what the forward pass on it returned, on any device.
        """
        seq_len = batch.tokens.shape[1]
        rows = Rows(
            token_T=batch.tokens.flatten().numpy(),
            position_T=batch.position.flatten().numpy(),
            document_T=(batch.sample[:, None] * seq_len + batch.document).flatten().numpy(),
            domain_T=batch.domain.flatten().numpy(),
            valid_T=(batch.document >= 0).flatten().numpy(),
        )
        return self._writer.put(self._label(step), rows, routings)

    def end_step(self) -> float:
        """The step is complete on this rank; returns the seconds that training waited."""
        return self._writer.end_part()

    def flush(self) -> float:
        """Wait until every ended step is on the disk, before a checkpoint that counts on them.

        Returns the seconds that training waited.
        """
        return self._writer.flush() + self._list()

    def close(self) -> None:
        """Wait until every ended step is on the disk; raises what went wrong."""
        self._writer.close()
        self._list()

    def __enter__(self) -> TrainingRecorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        # what the run is stopped by is said, not that its disk is full, too
        with contextlib.suppress(*([] if error is None else [OSError])):
            self._list()

    def _label(self, step: int) -> PartLabel:
        name = f"step_{step:08d}.rank_{self._rank:05d}.parquet"
        return PartLabel(name, step, self._rank, self._world_size)

    def _add(self, part: PartEntry) -> None:
        self._info = dataclasses.replace(self._info, parts=(*self._info.parts, part))
        if len(self._info.parts) >= self._num_listed * (1 + _GROWTH):
            self._list()

    def _list(self) -> float:
        """Bring the JSON up to date; returns the seconds that it took."""
        started = time.perf_counter()
        if len(self._info.parts) > self._num_listed:
            write_info(self._path, self._info)
            self._num_listed = len(self._info.parts)
        return time.perf_counter() - started


def describe_training(
    config: TrainConfig, manifest: Manifest, *, run_id: str, logits: bool
) -> TraceInfo:
    """What the trace of a run will say of itself."""
    model, router = config.model, config.router
    identity = {"run_id": run_id, "model": dataclasses.asdict(model), "router": router.name}
    settings = {
        "run": run_id, "model": model.name, "router": router.name,
        "mask_threshold": router.mask_threshold, "seq_len": config.data.seq_len,
        "logits": logits, "row_group_tokens": ROW_GROUP_TOKENS, "split": "train",
        "pad_id": manifest.end_of_text_id, "tokenizer_sha256": manifest.tokenizer.sha256,
    }  # fmt: skip
    return TraceInfo(
        schema_version=SCHEMA_VERSION,
        kind="training",
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        has_logits=logits,
        domains=manifest.domains,
        model_sha256=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        data_fingerprint=manifest.fingerprint,
        settings=json.dumps(settings),
    )


def _prepare(folder: Path, info: TraceInfo, *, resume_step: int, vocabulary: bytes | None) -> None:
    """Drop what was recorded after resume_step, by whichever ranks there were then."""
    make_folder(folder)
    entry: FileEntry | None = None
    if vocabulary is not None:
        replace_file(folder / VOCABULARY_NAME, vocabulary)
        written, _ = hash_file(folder / VOCABULARY_NAME)
        entry = FileEntry(VOCABULARY_NAME, written.size, written.sha256)
    kept: set[str] = set()
    of_ranks = [path for path in sorted(folder.iterdir()) if RANK_NAME.fullmatch(path.name)]
    for path in of_ranks:
        if resume_step == 0:
            remove_anyway(path)
            continue
        found = read_info(path)
        if dataclasses.replace(found, parts=(), vocabulary=None) != info:
            raise DataError(
                f"{path}: is of another run, or of this one with other settings of the trace. "
                f"Move {folder} away, or leave recording off (train.trace_every=0)."
            )
        parts = tuple(part for part in found.parts if part.step <= resume_step)
        write_info(path, dataclasses.replace(found, parts=parts, vocabulary=entry))
        kept |= {part.name for part in parts}
    first = folder / rank_name(0)
    if not first.exists():
        write_info(first, dataclasses.replace(info, vocabulary=entry))
    for path in folder.iterdir():
        is_part = path.name.startswith("step_") and path.suffix == ".parquet"
        if (is_part and path.name not in kept) or path.name.startswith(".step_"):
            remove_anyway(path)
    sync_folder(folder)
