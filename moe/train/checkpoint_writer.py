"""Save checkpoints from all ranks at once, and in the background while training goes on.

Every rank writes its own files into one temporary folder; when all have, rank 0 writes the manifest
and gives the folder its name. The thread that writes in the background talks to no other rank: the
ranks meet in save, poll and finish alone, which all of them call in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from moe.errors import CheckpointError, UserError
from moe.parallel.pieces import Piece
from moe.parallel.processes import Processes
from moe.progress_call import ProgressCall, no_progress
from moe.run_folder import checkpoint_name
from moe.train.atomic_files import Buffer, read_chunks, remove_anyway, sync_folder
from moe.train.checkpoint_files import (
    make_temporary_folder,
    publish,
    remove_leftovers,
    remove_old,
    saving_failed,
    write_files,
    write_manifest,
)
from moe.train.checkpoint_manifest import STATE_NAME, FileRecord
from moe.train.checkpoint_plan import (
    Listing,
    SavePlan,
    check_contents,
    list_pieces,
    plan_save,
    tensors_to_write,
)
from moe.train.host_copy import HostCopies
from moe.train.tensor_file import TensorToWrite, tensor_file_chunks

_NO_FILES: Mapping[str, Path | bytes] = {}
_PATIENCE_SECONDS = 0.01  # between two looks at the other ranks' writers


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole and has its name."""

    folder: Path
    step: int
    num_bytes: int  # of all ranks' files
    stall_seconds: float  # that this rank did not train, for all of this save
    write_seconds: float  # of the slowest rank: writing, hashing and flushing
    waited_seconds: float  # the part of the stall that was for the save before to end


@dataclass
class _OwnPart:
    """What this rank's writer did."""

    records: list[FileRecord] = field(default_factory=list)
    seconds: float = 0.0
    error: Exception | None = None


@dataclass
class _Flight:
    """A save that has begun."""

    step: int
    folder: Path
    plan: SavePlan
    part: _OwnPart
    thread: Thread | None
    stall_seconds: float
    waited_seconds: float
    best_step: int | None


class CheckpointWriter:
    """Saves under root; every rank has one, with the same arguments, and calls it alike.

    keep_last: as in save_checkpoint; steps that are a multiple of keep_every stay, too.
    in_background: save returns when this rank's tensors are copied to host memory (as much again as
    they take), and they are written from there. progress is told of every piece that is on its way
    to the disk, from whatever thread writes it.
    """

    def __init__(
        self,
        root: Path,
        *,
        processes: Processes,
        keep_last: int,
        keep_every: int = 0,
        in_background: bool,
        progress: ProgressCall = no_progress,
    ) -> None:
        if type(keep_last) is not int or keep_last < 1:
            raise ValueError(
                f"keep_last: got {keep_last!r}; it must be a whole number of at least 1"
            )
        self._root = Path(root)
        self._processes = processes
        self._keep_last, self._keep_every = keep_last, keep_every
        self._in_background = in_background
        self._progress = progress
        self._copies = HostCopies()
        self._flight: _Flight | None = None
        self._own_listing: Listing | None = None
        self._listings: list[Listing] = []  # of all ranks at the last save, and what follows
        self._plan: SavePlan | None = None

    def save(
        self,
        step: int,
        *,
        pieces: Mapping[str, Sequence[Piece]],
        state: Mapping[str, Any],
        extra_files: Mapping[str, Path | bytes] = _NO_FILES,
        best_step: int | None = None,
    ) -> Saved | None:
        """Save one checkpoint; returns the one that became whole during this call, if one did.

        In the foreground that is this one. In the background it is the one before, if it was still
        being written: its end is waited for. pieces: this rank's, by stem ("model"); together the
        ranks' pieces are each tensor exactly once. state and extra_files are as in
        save_checkpoint, and only rank 0's are used. best_step: of the checkpoint, this or an older
        one, that stays beside those that keep_last and keep_every keep.

        Raises on every rank alike: ValueError or TypeError for contents that cannot be stored,
        CheckpointError where the disk of any rank refuses; nothing saved before is touched then.
        """
        started = time.perf_counter()
        before = self.finish()
        waited = time.perf_counter() - started
        plan = self._agree(step, pieces, state, extra_files)
        folder = Path(self._from_first(step, lambda: str(self._make_folder(step))))
        flight = _Flight(step, folder, plan, _OwnPart(), None, 0.0, waited, best_step)
        self._flight = flight
        with self._abandoned_on_error():
            self._start(flight, pieces, state, extra_files)
        flight.stall_seconds += time.perf_counter() - started
        return before if self._in_background else self.finish()

    def poll(self) -> Saved | None:
        """Publish the save that is being written, if all ranks are done with it, and return it.

        Called by all ranks after every step; while nothing is being written it costs nothing.
        Raises CheckpointError on every rank where one of them could not write.
        """
        flight = self._flight
        if flight is None:
            return None
        started = time.perf_counter()
        with self._abandoned_on_error():
            is_done = flight.thread is None or not flight.thread.is_alive()
            done = torch.tensor([float(is_done)], device=self._processes.device)
            # syncs: one number, and only while a checkpoint is being written
            are_all_done = self._processes.sum(done).item() == self._processes.world_size
            num_bytes, write_seconds = self._publish(flight) if are_all_done else (0, 0.0)
        flight.stall_seconds += time.perf_counter() - started
        if not are_all_done:
            return None
        self._flight = None
        return Saved(
            folder=self._root / checkpoint_name(flight.step),
            step=flight.step,
            num_bytes=num_bytes,
            stall_seconds=flight.stall_seconds,
            write_seconds=write_seconds,
            waited_seconds=flight.waited_seconds,
        )

    def finish(self) -> Saved | None:
        """Wait for the save that is being written, if there is one; publish and return it."""
        while self._flight is not None:
            flight = self._flight
            started = time.perf_counter()
            with self._abandoned_on_error():
                # in short pieces: ranks that are done long before the others meet them again and
                # again, and no exchange waits until it is given up
                if flight.thread is not None:
                    flight.thread.join(timeout=1.0)
                elif self._processes.world_size > 1:
                    time.sleep(_PATIENCE_SECONDS)
                if flight.thread is not None and not flight.thread.is_alive():
                    flight.thread = None
            flight.stall_seconds += time.perf_counter() - started
            saved = self.poll()
            if saved is not None:
                return saved
        return None

    def _agree(
        self,
        step: int,
        pieces: Mapping[str, Sequence[Piece]],
        state: Mapping[str, Any],
        extra_files: Mapping[str, Path | bytes],
    ) -> SavePlan:
        """Tell every rank what this one holds, if that has changed, and plan from all of it."""
        error: Exception | None = None
        listing: Listing = {}
        try:
            check_contents(step, list(pieces), state, extra_files)
            listing = list_pieces(pieces)
        except (ValueError, TypeError) as caught:
            error = caught
        is_known = listing == self._own_listing
        told = self._exchange(
            {
                "error": None if error is None else str(error),
                "step": step if error is None else None,
                "pieces": None if is_known else listing,
            }
        )
        if error is not None:
            raise error
        for rank, other in enumerate(told):
            if other["error"] is not None:
                raise ValueError(f"rank {rank}: {other['error']}")
            if other["step"] != step:
                raise ValueError(f"rank {rank} saves step {other['step']}, this rank step {step}")
        if self._plan is None or any(other["pieces"] is not None for other in told):
            listings = [
                self._listings[rank] if other["pieces"] is None else other["pieces"]
                for rank, other in enumerate(told)
            ]
            self._plan = plan_save(listings)
            self._listings, self._own_listing = listings, listing
        return self._plan

    def _make_folder(self, step: int) -> Path:
        remove_leftovers(self._root)
        return make_temporary_folder(self._root, step)

    def _start(
        self,
        flight: _Flight,
        pieces: Mapping[str, Sequence[Piece]],
        state: Mapping[str, Any],
        extra_files: Mapping[str, Path | bytes],
    ) -> None:
        """Start to write this rank's files; an error is kept until the ranks meet."""
        rank = self._processes.rank
        files: dict[str, Iterable[Buffer]] = {}
        try:
            if self._processes.is_first:
                files |= _small_files(state, extra_files)
            tensors = {
                stem: tensors_to_write(pieces.get(stem, ()))
                for stem, writers in flight.plan.files.items()
                if rank in writers
            }
            if self._in_background:
                tensors = self._copies.copy(tensors)
            files |= {
                flight.plan.files[stem][rank]: _chunks(table) for stem, table in tensors.items()
            }
        except Exception as error:
            flight.part.error = error
            return
        arguments = (flight.folder, files, flight.part, self._processes.is_first, self._progress)
        if not self._in_background and self._processes.world_size == 1:
            _write_own_part(*arguments)
            return
        flight.thread = Thread(target=_write_own_part, args=arguments, daemon=True)
        flight.thread.start()

    def _publish(self, flight: _Flight) -> tuple[int, float]:
        """Gather what all ranks wrote and give the folder its name; bytes and slowest writer."""
        error = flight.part.error
        told = self._exchange(
            {
                "error": None if error is None else self._said(error, flight.step),
                "files": [dataclasses.astuple(record) for record in flight.part.records],
                "seconds": flight.part.seconds,
            }
        )
        if error is not None and not isinstance(error, (OSError, UserError)):
            raise error  # no refusal of the disk: its traceback is needed
        for other in told:
            if other["error"] is not None:
                raise CheckpointError(other["error"]) from error
        records = [FileRecord(*entry) for other in told for entry in other["files"]]

        def name_folder() -> str:
            write_manifest(flight.folder, flight.step, files=records, tables=flight.plan.tables)
            publish(flight.folder, self._root / checkpoint_name(flight.step))
            with contextlib.suppress(OSError):  # tried again at the next save
                remove_old(
                    self._root, flight.step, keep_last=self._keep_last,
                    keep_every=self._keep_every, best_step=flight.best_step,
                )  # fmt: skip
            return ""

        self._from_first(flight.step, name_folder)
        return sum(record.size for record in records), max(other["seconds"] for other in told)

    def _from_first(self, step: int, action: Callable[[], str]) -> str:
        """Do something on rank 0 and return its answer, or raise its error, on every rank."""
        error: Exception | None = None
        answer = ""
        if self._processes.is_first:
            try:
                answer = action()
            except Exception as caught:
                error = caught
        text = {"error": None if error is None else self._said(error, step), "answer": answer}
        told = json.loads(self._processes.from_first(json.dumps(text)))
        if error is not None and not isinstance(error, (OSError, UserError)):
            raise error
        if told["error"] is not None:
            raise CheckpointError(told["error"]) from error
        return told["answer"]

    def _said(self, error: Exception, step: int) -> str:
        if isinstance(error, UserError):
            return str(error)
        rank = None if self._processes.world_size == 1 else self._processes.rank
        return str(saving_failed(error, self._root, step, rank=rank))

    def _exchange(self, told: Mapping[str, Any]) -> list[Any]:
        return [json.loads(text) for text in self._processes.all_texts(json.dumps(told))]

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """Give up the save in flight on any error, an interrupt included, and leave no folder."""
        try:
            yield
        except BaseException:
            if self._flight is not None and self._processes.is_first:
                remove_anyway(self._flight.folder)
            self._flight = None
            raise


def _small_files(
    state: Mapping[str, Any], extra_files: Mapping[str, Path | bytes]
) -> dict[str, Iterable[Buffer]]:
    files: dict[str, Iterable[Buffer]] = {
        name: [source] if isinstance(source, bytes) else read_chunks(Path(source))
        for name, source in extra_files.items()
    }
    files[STATE_NAME] = [json.dumps(dict(state), separators=(",", ":")).encode("ascii")]
    return files


def _chunks(table: Mapping[str, TensorToWrite]) -> Iterator[bytes | memoryview]:
    yield from tensor_file_chunks(table)


def _write_own_part(
    folder: Path,
    files: dict[str, Iterable[Buffer]],
    part: _OwnPart,
    is_first: bool,
    progress: ProgressCall,
) -> None:
    started = time.perf_counter()
    try:
        part.records = write_files(folder, files, progress=progress)
        if not is_first:
            sync_folder(folder)  # rank 0 does so when the manifest is in it
    except Exception as error:
        part.error = error
    part.seconds = time.perf_counter() - started
    files.clear()  # the copies' memory is free before the ranks meet
