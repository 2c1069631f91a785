"""Save, find and open checkpoints that are never torn, never silently wrong, and never unpickled.

    <root>/step_00000100/   model.safetensors, optimizer.safetensors, state.json, manifest.json, ...
    <root>/latest           the name of the folder that was saved last, for people and scripts

A checkpoint is built in a folder of another name, flushed to the disk, and renamed when it is
whole, so a folder named step_* is whole at every instant; `moe.train.checkpoint_files` holds that
order. Opening one checks the SHA-256 of every byte before any tensor is handed out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe.errors import CheckpointError, nearest
from moe.train.atomic_files import Identity, file_identity, hash_file, read_small_file
from moe.train.checkpoint_files import (
    checkpoint_name,
    list_checkpoints,
    publish,
    read_latest,
    remove_leftovers,
    remove_old,
    saving_failed,
    step_of_name,
    temporary_folder,
    write_files,
)
from moe.train.checkpoint_manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    TENSOR_SUFFIX,
    FileRecord,
    Manifest,
    is_plain_name,
    parse_manifest,
)
from moe.train.tensor_file import (
    copy_stored_tensors,
    describe_tensors,
    read_tensor_table,
    read_tensors,
)
from moe.train.tensor_header import TensorRecord

_NO_FILES: Mapping[str, Path | bytes] = {}
_MANIFEST_LIMIT_BYTES = 64 * 2**20  # about a million tensors
_STATE_LIMIT_BYTES = 256 * 2**20
_WHAT_TO_DO = (
    "Restore the file from a copy, or delete this folder: the checkpoint before it is used then."
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose every byte was verified when it was opened."""

    folder: Path
    step: int
    state: dict[str, Any]
    manifest: Manifest
    verified: Mapping[str, Identity] = field(repr=False)  # each file as it was when it was hashed

    def tensors(self, stem: str) -> dict[str, torch.Tensor]:
        """The tensors saved under stem ("model", "optimizer"), on the CPU, owning their memory.

        Raises CheckpointError where the checkpoint has none, or the file changed after it was
        verified.
        """
        self.table(stem)
        name = stem + TENSOR_SUFFIX
        with _about(self.folder, name):
            tensors = read_tensors(self.folder / name)
        self.file(name)  # still the file that was verified, now that it has been read
        return tensors

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
        name = stem + TENSOR_SUFFIX
        with _about(self.folder, name):
            copy_stored_tensors(self.folder / name, into)
        self.file(name)

    def table(self, stem: str) -> Mapping[str, TensorRecord]:
        """Type and shape of each tensor saved under stem, by name."""
        if stem not in self.manifest.tensors:
            known = sorted(self.manifest.tensors)
            raise CheckpointError(
                f"{self.folder}: has no tensors named {stem!r}.{nearest(stem, known)} "
                f"It has: {', '.join(known) or 'none'}."
            )
        return self.manifest.tensors[stem]

    def file(self, name: str) -> Path:
        """The path of one verified file, such as "tokenizer.model"; refused if it has changed."""
        if name not in self.verified:
            raise CheckpointError(
                f"{self.folder}: has no file {name!r}.{nearest(name, self.verified)} "
                f"It has: {', '.join(sorted(self.verified))}."
            )
        path = self.folder / name
        with _about(self.folder, name):
            if file_identity(path) != self.verified[name]:
                raise ValueError("it was changed by another program after it was verified")
        return path


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    extra_files: Mapping[str, Path | bytes] = _NO_FILES,
    keep_last: int,
) -> Path:
    """Save one checkpoint under root and return its folder; one process of a run calls this.

    tensors maps a file's stem to tensors by name, on any device, strided or sharing storage; state
    holds plain JSON values (float bits, inf and nan are kept); extra_files maps a file name to its
    bytes or to a file to copy. A step saved before is replaced. When the new checkpoint is on the
    disk, those older than the newest keep_last are removed; checkpoints of later steps are left.

    Raises CheckpointError where the disk refuses (full, read-only, a file-size limit): nothing
    saved before is touched then. Raises ValueError or TypeError for contents that cannot be stored.
    """
    _check_contents(step, tensors, state, extra_files, keep_last)
    root = Path(root)
    try:
        remove_leftovers(root)
        with temporary_folder(root, step) as folder:
            write_files(folder, step, tensors=tensors, state=state, extra_files=extra_files)
            publish(folder, root / checkpoint_name(step))
    except OSError as error:
        raise saving_failed(error, root, step) from error
    remove_old(root, step, keep_last=keep_last)
    return root / checkpoint_name(step)


def _check_contents(
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    extra_files: Mapping[str, Path | bytes],
    keep_last: int,
) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step: got {step!r}; it must be a whole number of at least 0")
    if type(keep_last) is not int or keep_last < 1:
        raise ValueError(f"keep_last: got {keep_last!r}; it must be a whole number of at least 1")
    for stem, table in tensors.items():
        if not is_plain_name(stem + TENSOR_SUFFIX):
            raise ValueError(f"tensors: {stem!r} is not a plain file name")
        describe_tensors(table)
    for name in extra_files:
        reserved = name in (MANIFEST_NAME, STATE_NAME) or name.endswith(TENSOR_SUFFIX)
        if reserved or not is_plain_name(name):
            raise ValueError(f"extra_files: {name!r} is reserved or not a plain file name")
    _require_plain(dict(state), "state")


def _require_plain(value: Any, where: str) -> None:
    # a tuple or a key that is a number would come back as something else
    if type(value) is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: key {key!r} must be text to come back the same")
            _require_plain(inner, f"{where}.{key}")
    elif type(value) is list:
        for i, inner in enumerate(value):
            _require_plain(inner, f"{where}[{i}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(
            f"{where}: {type(value).__name__} would not come back the same; "
            "allowed: dict, list, str, int, float, bool, None"
        )


def find_checkpoint(root: Path, *, on_skip: Callable[[str], None]) -> Checkpoint | None:
    """Open the newest good checkpoint under root; None where there is none at all.

    Newest is the highest step: a run stopped between renaming a checkpoint and updating `latest`
    loses nothing. To go back to an older one, delete the newer folders. on_skip receives one
    message for each damaged checkpoint passed over, and for a `latest` that names none. Raises
    CheckpointError where there are checkpoints and not one is good.
    """
    root = Path(root)
    try:
        found = list_checkpoints(root)
    except OSError as error:
        raise CheckpointError(
            f"{root}: cannot be listed ({error.strerror}). Check its permissions."
        ) from error
    try:
        latest = read_latest(root)
        if latest is not None and latest not in {checkpoint_name(step) for step, _ in found}:
            on_skip(f"{root / 'latest'}: names {latest!r}, which is not there; ignored.")
    except (OSError, ValueError) as error:
        on_skip(f"{root / 'latest'}: cannot be used ({_reason(error)}); ignored.")
    problems = []
    for step, folder in found:
        try:
            checkpoint = open_checkpoint(folder)
            if checkpoint.step != step:
                raise CheckpointError(f"{folder}: holds step {checkpoint.step}. {_WHAT_TO_DO}")
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


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint and return it; no byte of a tensor is used before all of it is verified.

    Checked in this order: the manifest's spelling, own hash and schema; its step against the
    folder's name; every file's name, kind (no links), size and SHA-256; each safetensors header
    against the manifest's table; state.json. A *.safetensors file that the manifest does not list
    is refused, as tools that read all of them would mix it in; any other unlisted file is never
    opened and does not matter. Costs about 0.9 s for each GiB and core, on two threads.

    Raises CheckpointError naming the file, what is wrong with it, and what to do.
    """
    folder = Path(folder).resolve()
    with _about(folder, ""):
        names = {entry.name for entry in folder.iterdir()}
    with _about(folder, MANIFEST_NAME):
        raw = read_small_file(folder / MANIFEST_NAME, limit_bytes=_MANIFEST_LIMIT_BYTES)
        manifest = parse_manifest(raw)
        named_step = step_of_name(folder.name)
        if named_step is not None and manifest.step != named_step:
            raise ValueError(f"it belongs to step {manifest.step}, not to step {named_step}")
    for name in sorted(names - {file.name for file in manifest.files}):
        if name.endswith(TENSOR_SUFFIX):
            with _about(folder, name):
                raise ValueError("the manifest does not list this file")
    verified = _verify_files(folder, manifest)
    for stem, table in manifest.tensors.items():
        with _about(folder, stem + TENSOR_SUFFIX):
            if read_tensor_table(folder / (stem + TENSOR_SUFFIX)) != table:
                raise ValueError("its names, types or shapes differ from the manifest's table")
    return Checkpoint(folder, manifest.step, _read_state(folder, manifest), manifest, verified)


def _verify_files(folder: Path, manifest: Manifest) -> dict[str, Identity]:
    for record in manifest.files:  # sizes first: they cost nothing
        with _about(folder, record.name):
            size = file_identity(folder / record.name).size
            if size != record.size:
                raise ValueError(f"it has {size:,} bytes; the manifest says {record.size:,}")

    def verify(record: FileRecord) -> Identity:
        with _about(folder, record.name):
            written, identity = hash_file(folder / record.name)
            if written.sha256 != record.sha256:
                raise ValueError(
                    f"its SHA-256 is {written.sha256[:12]}..., "
                    f"the manifest says {record.sha256[:12]}..."
                )
            return identity

    largest_first = sorted(manifest.files, key=lambda record: -record.size)
    with ThreadPoolExecutor(max_workers=2) as pool:
        identities = list(pool.map(verify, largest_first))
    return {record.name: seen for record, seen in zip(largest_first, identities, strict=True)}


def _read_state(folder: Path, manifest: Manifest) -> dict[str, Any]:
    with _about(folder, STATE_NAME):
        raw = read_small_file(folder / STATE_NAME, limit_bytes=_STATE_LIMIT_BYTES)
        records = {record.name: record for record in manifest.files}
        if hashlib.sha256(raw).hexdigest() != records[STATE_NAME].sha256:
            raise ValueError("it was changed by another program after it was verified")
        try:
            state = json.loads(raw)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(state, dict):
            raise ValueError("it is not a JSON object")
        return state


@contextlib.contextmanager
def _about(folder: Path, name: str) -> Iterator[None]:
    """Turn a reason into one message with the folder, the file and what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        where = f"{folder}: {name}: " if name else f"{folder}: "
        raise CheckpointError(f"{where}{_reason(error)}. {_WHAT_TO_DO}") from error


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror})"
    return str(error)
