"""Whether a checkpoint's files are those of its manifest, byte for byte, hashed by all ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe.errors import CheckpointError
from moe.file_shares import share_of_sizes
from moe.parallel.processes import Processes
from moe.progress_call import ProgressCall, no_progress
from moe.run_folder import step_of_name
from moe.train.atomic_files import Identity, file_identity, hash_file, read_small_file
from moe.train.checkpoint_damage import about
from moe.train.checkpoint_manifest import (
    MANIFEST_NAME,
    TENSOR_SUFFIX,
    FileRecord,
    Manifest,
    parse_manifest,
    tensor_files,
)

_MANIFEST_LIMIT_BYTES = 64 * 2**20  # about a million tensors


def verify_folder(
    folder: Path,
    processes: Processes,
    *,
    stems: Collection[str] | None = None,
    progress: ProgressCall = no_progress,
) -> tuple[Manifest, Mapping[str, Identity]]:
    """Read and believe a folder's manifest, and each file's state in which its hash was right.

    Every rank looks at every file's name, kind and size, and hashes a share of the bytes. stems:
    those whose tensors will be read; files of others are not hashed and not among the returned.
    Raises the same CheckpointError on every rank where one of them finds a fault.
    """
    error: CheckpointError | None = None
    raw = b""
    manifest: Manifest | None = None
    seen: dict[str, Identity] = {}
    try:
        raw, manifest = _read_manifest(folder)
        seen = _look_at_files(folder, manifest)
        if stems is not None:
            unread = {
                n for s in manifest.tensors if s not in stems for n in tensor_files(manifest, s)
            }
            seen = {name: identity for name, identity in seen.items() if name not in unread}
        files = tuple(record for record in manifest.files if record.name in seen)
        share = share_of_files(files, processes.rank, world_size=processes.world_size)
        _hash_files(folder, share, seen, progress)
    except CheckpointError as caught:
        error = caught
    raise_together(error, processes, saw=hashlib.sha256(raw).hexdigest(), where=folder)
    assert manifest is not None
    return manifest, seen


def raise_together(
    error: CheckpointError | None, processes: Processes, *, saw: str = "", where: Path
) -> None:
    """Raise the first rank's error on every rank, if one has any; what the ranks saw must agree."""
    text = json.dumps({"error": None if error is None else str(error), "saw": saw})
    told = [json.loads(other) for other in processes.all_texts(text)]
    for rank, other in enumerate(told):
        if other["saw"] != told[0]["saw"]:
            raise CheckpointError(
                f"{where}: rank {rank} does not read the {MANIFEST_NAME} that rank 0 reads"
                f"{': ' + other['error'] if other['error'] else '.'} Put the run folder on a disk "
                "that all ranks share."
            )
    first = next((other["error"] for other in told if other["error"] is not None), None)
    if first is not None:
        raise CheckpointError(first) from error


def share_of_files(
    files: tuple[FileRecord, ...], rank: int, *, world_size: int
) -> list[FileRecord]:
    """The files that a rank hashes: about as many bytes as any other's."""
    ordered = sorted(files, key=lambda record: record.name)
    numbers = share_of_sizes([r.size for r in ordered], rank, num_parts=world_size)
    return [ordered[number] for number in numbers]


def _read_manifest(folder: Path) -> tuple[bytes, Manifest]:
    with about(folder, ""):
        names = {entry.name for entry in folder.iterdir()}
    with about(folder, MANIFEST_NAME):
        raw = read_small_file(folder / MANIFEST_NAME, limit_bytes=_MANIFEST_LIMIT_BYTES)
        manifest = parse_manifest(raw)
        named_step = step_of_name(folder.name)
        if named_step is not None and manifest.step != named_step:
            raise ValueError(f"it belongs to step {manifest.step}, not to step {named_step}")
    for name in sorted(names - {file.name for file in manifest.files}):
        if name.endswith(TENSOR_SUFFIX):
            with about(folder, name):
                raise ValueError("the manifest does not list this file")
    return raw, manifest


def _look_at_files(folder: Path, manifest: Manifest) -> dict[str, Identity]:
    seen = {}
    for record in manifest.files:  # sizes first: they cost nothing
        with about(folder, record.name):
            seen[record.name] = file_identity(folder / record.name)
            size = seen[record.name].size
            if size != record.size:
                raise ValueError(f"it has {size:,} bytes; the manifest says {record.size:,}")
    return seen


def _hash_files(
    folder: Path,
    share: list[FileRecord],
    seen: Mapping[str, Identity],
    progress: ProgressCall,
) -> None:
    def verify(record: FileRecord) -> None:
        with about(folder, record.name):
            written, identity = hash_file(folder / record.name, progress=progress)
            if written.sha256 != record.sha256:
                raise ValueError(
                    f"its SHA-256 is {written.sha256[:12]}..., "
                    f"the manifest says {record.sha256[:12]}..."
                )
            if identity != seen[record.name]:
                raise ValueError("it was changed by another program while it was verified")

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(verify, share))
