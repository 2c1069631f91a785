"""Save, find and open checkpoints that are never torn, never silently wrong, and never unpickled.

    <root>/step_00000100/   model.safetensors, optimizer.safetensors, state.json, manifest.json, ...
    <root>/latest           the name of the folder that was saved last, for people and scripts

Several ranks write model-00001-of-00004.safetensors, ... instead, each its ranges of the tensors;
any number of processes reads whole tensors, or any range, from either. A checkpoint is built in a
folder of another name, flushed to the disk, and renamed when it is whole, so a folder named step_*
is whole at every instant; `moe.train.checkpoint_files` holds that order. Opening one checks the
SHA-256 of every byte before any tensor is handed out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe.errors import CheckpointError, nearest
from moe.parallel.pieces import Piece
from moe.parallel.processes import Processes
from moe.progress_call import ProgressCall, no_progress
from moe.run_folder import checkpoint_name
from moe.train.atomic_files import (
    Identity,
    file_identity,
    opened_without_links,
    read_small_file,
)
from moe.train.checkpoint_damage import WHAT_TO_DO, about, reason
from moe.train.checkpoint_files import list_checkpoints, read_latest
from moe.train.checkpoint_manifest import STATE_NAME, Manifest, tensor_files
from moe.train.checkpoint_shards import locate_tensors
from moe.train.checkpoint_verify import raise_together, verify_folder
from moe.train.checkpoint_writer import CheckpointWriter
from moe.train.tensor_file import TORCH_DTYPES, byte_chunks, read_elements
from moe.train.tensor_header import AnyTensor, TensorRecord

_NO_FILES: Mapping[str, Path | bytes] = {}
_STATE_LIMIT_BYTES = 256 * 2**20
_CHANGED = "it was changed by another program after it was verified"


def one_process() -> Processes:
    """This process alone, on the CPU, whatever process group it may be in."""
    return Processes(rank=0, world_size=1, device=torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint of which every byte that can be read was verified when it was opened."""

    folder: Path
    step: int
    state: dict[str, Any]
    manifest: Manifest
    verified: Mapping[str, Identity] = field(repr=False)  # each file as it was when it was hashed
    located: Mapping[str, Mapping[str, AnyTensor]] = field(repr=False)
    progress: ProgressCall = field(default=no_progress, repr=False)  # of bytes read

    def tensors(self, stem: str) -> dict[str, torch.Tensor]:
        """The tensors saved under stem ("model", "optimizer"), on the CPU, owning their memory.

        Raises CheckpointError where the checkpoint has none, or a file changed after it was
        verified.
        """
        made = {}
        for name, record in self.table(stem).items():
            made[name] = torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype])
            self.read_range(stem, name, 0, made[name])
        self.require_unchanged(stem)
        return made

    def copy_tensors(self, stem: str, into: Mapping[str, torch.Tensor]) -> None:
        """Copy every tensor saved under stem into the tensor of its name; shapes must agree.

        Read in pieces of a few MiB, never a whole file: memory is what `into` has. A value of
        another type is converted. Raises CheckpointError as `tensors` does, and ValueError where
        names or shapes differ.
        """
        table = self.table(stem)
        if {name: record.shape for name, record in table.items()} != {
            name: tuple(tensor.shape) for name, tensor in into.items()
        }:
            raise ValueError(f"{self.folder}: {stem}: names or shapes differ from those to fill")
        for name, tensor in into.items():
            self.read_range(stem, name, 0, tensor)
        self.require_unchanged(stem)

    def read_range(self, stem: str, name: str, start: int, into: torch.Tensor) -> None:
        """Fill `into` with elements of a flattened whole tensor, from element `start` on.

        into: contiguous, on any device; values of another type are converted. Any layout that was
        saved is read alike. Raises CheckpointError where a file changed after it was verified, and
        ValueError for a range outside of the tensor.
        """
        record = self.table(stem).get(name)
        if record is None:
            raise CheckpointError(
                f"{self.folder}: {stem} has no tensor {name!r}.{nearest(name, self.table(stem))}"
            )
        num_elements = math.prod(record.shape)
        if start < 0 or start + into.numel() > num_elements:
            raise ValueError(
                f"{stem}.{name}: elements {start} to {start + into.numel()} were asked for, and it "
                f"has {num_elements}"
            )
        read_elements(
            self.stored(stem)[name], start, into, open_file=self._opened, progress=self.progress
        )

    def hashes(self, stem: str) -> dict[str, str]:
        """The SHA-256 of each whole tensor's bytes, in order, whatever files they lie in."""
        hashed = {}
        for name, tensor in self.stored(stem).items():
            digest = hashlib.sha256()
            for chunk in byte_chunks(tensor, open_file=self._opened):
                digest.update(chunk)
            hashed[name] = digest.hexdigest()
        return hashed

    def table(self, stem: str) -> Mapping[str, TensorRecord]:
        """Type and shape of each whole tensor saved under stem, by name."""
        if stem not in self.manifest.tensors:
            known = sorted(self.manifest.tensors)
            raise CheckpointError(
                f"{self.folder}: has no tensors named {stem!r}.{nearest(stem, known)} "
                f"It has: {', '.join(known) or 'none'}."
            )
        return self.manifest.tensors[stem]

    def stored(self, stem: str) -> Mapping[str, AnyTensor]:
        """Where the bytes of each tensor saved under stem are, for readers of their own."""
        self.table(stem)
        if stem not in self.located:
            raise ValueError(f"{self.folder}: was opened without {stem}, so it is not verified")
        return self.located[stem]

    def require_unchanged(self, stem: str) -> None:
        """Raise CheckpointError where a file with tensors of stem changed after it was verified."""
        for name in tensor_files(self.manifest, stem):
            self.file(name)

    def file(self, name: str) -> Path:
        """The path of one verified file, such as "tokenizer.model"; refused if it has changed."""
        if name not in self.verified:
            raise CheckpointError(
                f"{self.folder}: has no file {name!r}.{nearest(name, self.verified)} "
                f"It has: {', '.join(sorted(self.verified))}."
            )
        path = self.folder / name
        with about(self.folder, name):
            if file_identity(path) != self.verified[name]:
                raise ValueError(_CHANGED)
        return path

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        """A descriptor of a verified file, which is the same before and after it is read."""
        with about(self.folder, path.name), opened_without_links(path) as descriptor:
            self.file(path.name)
            yield descriptor
            self.file(path.name)


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    extra_files: Mapping[str, Path | bytes] = _NO_FILES,
    keep_last: int,
) -> Path:
    """Save one checkpoint under root from one process and return its folder.

    tensors maps a file's stem to tensors by name, on any device, strided or sharing storage; state
    holds plain JSON values (float bits, inf and nan are kept); extra_files maps a file name to its
    bytes or to a file to copy. A step saved before is replaced. When the new checkpoint is on the
    disk, those older than the newest keep_last are removed; checkpoints of later steps are left.

    Raises CheckpointError where the disk refuses (full, read-only, a file-size limit): nothing
    saved before is touched then. Raises ValueError or TypeError for contents that cannot be stored.
    """
    root = Path(root)
    writer = CheckpointWriter(
        root, processes=one_process(), keep_last=keep_last, in_background=False
    )
    pieces = {
        stem: [Piece(name, tuple(tensor.shape), 0, tensor) for name, tensor in table.items()]
        for stem, table in tensors.items()
    }
    writer.save(step, pieces=pieces, state=state, extra_files=extra_files)
    return root / checkpoint_name(step)


def find_checkpoint(
    root: Path,
    *,
    on_skip: Callable[[str], None],
    stems: Collection[str] | None = None,
    processes: Processes | None = None,
    progress: ProgressCall = no_progress,
) -> Checkpoint | None:
    """Open the newest good checkpoint under root; None where there is none at all.

    Newest is the highest step: a run stopped between renaming a checkpoint and updating `latest`
    loses nothing. To go back to an older one, delete the newer folders. on_skip receives one
    message for each damaged checkpoint passed over, and for a `latest` that names none. Raises
    CheckpointError where there are checkpoints and not one is good.

    stems: those whose tensors will be read; files of others are not hashed, so that one is good
    whose optimiser is damaged where the model alone is wanted. processes: all ranks call this
    together, hash a share of the bytes each, and take the same checkpoint, or raise the same error.
    progress is told of the bytes hashed, and later of those
    read from the checkpoint.
    """
    ranks = processes or one_process()
    root = Path(root)
    found, notes = _candidates(root, ranks)
    for note in notes:
        on_skip(note)
    problems = []
    for step, folder in found:
        try:
            checkpoint = open_checkpoint(folder, stems=stems, processes=ranks, progress=progress)
            if checkpoint.step != step:
                raise CheckpointError(f"{folder}: holds step {checkpoint.step}. {WHAT_TO_DO}")
            return checkpoint
        except CheckpointError as error:
            problems.append(str(error))
            on_skip(str(error))
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"{root}: not one of {len(problems)} checkpoints is good:\n  {listed}\n"
            "To start again from the first step, choose another run folder or delete this one."
        )
    return None


def _candidates(root: Path, processes: Processes) -> tuple[list[tuple[int, Path]], list[str]]:
    """Step and folder of every checkpoint, newest first, and what is odd about `latest`.

    Rank 0 looks and tells the others: a folder that appears meanwhile must not divide them.
    """
    told: dict[str, Any] = {"error": None, "found": [], "notes": []}
    if processes.is_first:
        try:
            told["found"] = [(step, folder.name) for step, folder in list_checkpoints(root)]
        except OSError as error:
            told["error"] = f"{root}: cannot be listed ({error.strerror}). Check its permissions."
        else:
            told["notes"] = _notes_on_latest(root, {checkpoint_name(s) for s, _ in told["found"]})
    told = json.loads(processes.from_first(json.dumps(told)))
    if told["error"] is not None:
        raise CheckpointError(told["error"])
    return [(step, root / name) for step, name in told["found"]], told["notes"]


def _notes_on_latest(root: Path, names: set[str]) -> list[str]:
    try:
        latest = read_latest(root)
    except (OSError, ValueError) as error:
        return [f"{root / 'latest'}: cannot be used ({reason(error)}); ignored."]
    if latest is not None and latest not in names:
        return [f"{root / 'latest'}: names {latest!r}, which is not there; ignored."]
    return []


def open_checkpoint(
    folder: Path,
    *,
    stems: Collection[str] | None = None,
    processes: Processes | None = None,
    progress: ProgressCall = no_progress,
) -> Checkpoint:
    """Verify a checkpoint and return it; no byte of a tensor is used before all of it is verified.

    Checked in this order: the manifest's spelling, own hash and schema; its step against the
    folder's name; every file's name, kind (no links), size and SHA-256; each safetensors header
    against the manifest's table, of which shards hold each element once; state.json. A
    *.safetensors file that the manifest does not list is refused, as tools that read all of them
    would mix it in; any other unlisted file is never opened and does not matter. Costs about 0.9 s
    for each GiB and core, on two threads of each process; stems, processes and progress: as
    in find_checkpoint.

    Raises CheckpointError naming the file, what is wrong with it, and what to do.
    """
    ranks = processes or one_process()
    folder = Path(folder).resolve()
    manifest, verified = verify_folder(folder, ranks, stems=stems, progress=progress)
    error: CheckpointError | None = None
    state: dict[str, Any] = {}
    located = {}
    try:
        for stem, table in manifest.tensors.items():
            if stems is not None and stem not in stems:
                continue
            files = tensor_files(manifest, stem)
            located[stem] = locate_tensors(folder, stem, files=files, table=table)
        state = _read_state(folder, manifest)
    except CheckpointError as caught:
        error = caught
    raise_together(error, ranks, where=folder)
    return Checkpoint(folder, manifest.step, state, manifest, verified, located, progress)


def _read_state(folder: Path, manifest: Manifest) -> dict[str, Any]:
    with about(folder, STATE_NAME):
        raw = read_small_file(folder / STATE_NAME, limit_bytes=_STATE_LIMIT_BYTES)
        records = {record.name: record for record in manifest.files}
        if hashlib.sha256(raw).hexdigest() != records[STATE_NAME].sha256:
            raise ValueError(_CHANGED)
        try:
            state = json.loads(raw)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(state, dict):
            raise ValueError("it is not a JSON object")
        return state
