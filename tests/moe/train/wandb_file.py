"""What is in the .wandb file of an offline run, and a home folder in which W&B knows nobody.

The file is read without wandb's help where its layout is concerned (a LevelDB log: blocks of
32 KiB, records of checksum, length, type, data, after a header of 7 bytes), so that a test sees
what is on disk and not what the library remembers.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest


def leave_the_user_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own W&B set-up is read, and all that wandb writes is below home."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))


def only_wandb_file(run_dir: Path) -> Path:
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return path


def read_log(path: Path) -> list[Any]:
    """The protobuf records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    records, pending, at = [], b"", 7
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too short for a header: padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if kind == 0:
            break
        pending += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(pending))
            pending = b""
    return records


def history(path: Path) -> dict[int, dict[str, Any]]:
    """step -> logged values, pictures and histograms as dicts; a step that is twice there fails."""
    rows: dict[int, dict[str, Any]] = {}
    for record in of_kind(path, "history"):
        values: dict[str, Any] = {}
        for item in record.item:
            name, *inner = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            if inner:
                values.setdefault(name, {})["/".join(inner)] = value
            else:
                values[name] = value
        step = values["_step"]
        assert step == record.step.num
        assert step not in rows, f"step {step} is there twice"
        rows[step] = values
    return rows


def of_kind(path: Path, kind: str) -> list[Any]:
    """The records of one kind: run, metric, summary, artifact."""
    records = read_log(path)
    return [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]


def axes(path: Path) -> dict[str, str]:
    """Name or pattern of every defined metric -> its axis; "hidden" for one without a panel."""
    return {
        (m.name or m.glob_name): ("hidden" if m.options.hidden else m.step_metric)
        for m in of_kind(path, "metric")
    }


def last_summary(path: Path) -> dict[str, Any]:
    """The numbers that the table of runs shows."""
    return {
        (item.nested_key[0] if item.nested_key else item.key): json.loads(item.value_json)
        for update in of_kind(path, "summary")
        for item in update.update
    }


def artifacts(path: Path) -> list[dict[str, Any]]:
    """Of every logged artifact: name, type, metadata, and files as path -> (MD5, size, place)."""
    return [
        {
            "name": a.name, "type": a.type, "metadata": json.loads(a.metadata),
            "files": {c.path: (c.digest, c.size, Path(c.local_path)) for c in a.manifest.contents},
        }
        for a in of_kind(path, "artifact")
    ]  # fmt: skip
