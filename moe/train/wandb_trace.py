"""How a routing trace goes to W&B: as an artifact of its run, or as a run of its own.

An artifact is the files of a trace and what they are of. Offline it waits in the run's folder as
a list of the files with their hashes, not as a copy: `wandb sync` reads the files where they lie,
so send a run before its folder is moved, and from the working directory in which it was trained:
where it does not find them it sends the run alone, and launch/log_trace.py can send the trace.
The list itself is sent too; so it has paths as they were typed, relative ones where they were,
and tells no more of this machine than paths.run_dir does. W&B keeps one version of equal contents,
so a run that goes on, or is sent twice, has its trace once. Checkpoints never go to W&B.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from moe.config import LoggingConfig
from moe.errors import ConfigError
from moe.trace.info import RANK_NAME, TRACE_NAME, TraceInfo
from moe.trace.read import open_trace
from moe.train.redact import redact
from moe.train.wandb_run import end_run, import_wandb, offline_folders, set_aside, start_run

ARTIFACT_TYPE = "routing-trace"
_MEBIBYTE = 2**20
_UPLOAD_SECONDS = 24 * 3600.0  # of log_trace, which is there to wait for it
# not the places of model and data; trace.json has them as launch/trace.py was given them
_SETTINGS = (
    "model", "router", "mask_threshold", "seq_len", "split", "max_tokens", "tokenizer_sha256",
)  # fmt: skip


def trace_artifact(wandb: Any, folder: str | Path, *, name: str, limit_mib: int) -> Any:
    """Return the artifact of a trace folder, not yet logged.

    Raises ConfigError where its files are larger than limit_mib or its JSON holds a secret,
    DataError for a trace that is damaged or not there.
    """
    folder = Path(folder).expanduser()
    info = open_trace(folder).info
    _refuse_secrets(folder, info)
    files = _files(folder, info)
    num_bytes = sum(path.stat().st_size for path in files)
    if num_bytes > limit_mib * _MEBIBYTE:
        needed = -(-num_bytes // _MEBIBYTE)
        raise ConfigError(
            f"logging.upload_trace_mib: got {limit_mib}; the routing trace in {folder} has "
            f"{num_bytes:,} bytes and is not sent to W&B. It stays where it is. Set "
            f"logging.upload_trace_mib={needed} or more to send it, or record fewer steps."
        )
    metadata = redact(trace_metadata(info), os.environ)
    artifact = wandb.Artifact(name, type=ARTIFACT_TYPE, metadata=metadata)
    for path in files:
        artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
    return artifact


def trace_metadata(info: TraceInfo) -> dict[str, Any]:
    """What a trace is of, and how much: numbers, names and hashes, no place of this machine."""
    steps = info.steps
    return {
        "kind": info.kind,
        "layers": info.num_layers,
        "experts": info.num_experts,
        "top_k": info.top_k,
        "logits": info.has_logits,
        "tokens": info.num_tokens,
        "documents": info.num_documents,
        "tokens_of_domain": dict(zip(info.domains, info.tokens_of_domain, strict=True)),
        "bytes": info.num_bytes,
        "model_sha256": info.model_sha256,
        "data_fingerprint": info.data_fingerprint,
        "settings": {
            name: info.setting(name) for name in _SETTINGS if info.setting(name) is not None
        },
    } | ({"steps": len(steps), "first_step": steps[0], "last_step": steps[-1]} if steps else {})


def log_trace(config: LoggingConfig, folder: str | Path) -> Path | None:
    """Log a trace as a W&B run of its own; returns its offline folder, None where it is online.

    The run's id follows from the trace's contents and its files lie in the trace's folder, so
    logging it again replaces what was there. Raises UserError as trace_artifact and start_run do.
    """
    folder = Path(folder).expanduser()
    info = open_trace(folder).info
    wandb = import_wandb()
    run_id = _identity(info)[:8]
    artifact = trace_artifact(
        wandb, folder, name=f"routing-{run_id}", limit_mib=config.upload_trace_mib
    )
    earlier = offline_folders(folder, run_id)
    run = start_run(
        wandb, config, run_dir=folder, run_id=run_id, run_name=f"trace of {info.setting('model')}",
        values=trace_metadata(info), program="launch/log_trace.py", finish_seconds=_UPLOAD_SECONDS,
    )  # fmt: skip
    own = Path(run.dir).parent
    run.log_artifact(artifact)
    end_run(wandb, run)
    set_aside(sorted(path for path in earlier if path.name != own.name))
    return own if config.wandb == "offline" else None


def _refuse_secrets(folder: Path, info: TraceInfo) -> None:
    """The JSON is sealed, so a secret in a folder's name cannot be taken out of it."""
    settings = json.loads(info.settings)
    shown = redact(settings, os.environ)
    hidden = [name for name in settings if shown.get(name) != settings[name]]
    if hidden:
        raise ConfigError(
            f"trace: what {folder} says of itself holds a secret ({', '.join(hidden)}), so it is "
            "not sent to W&B. Trace again with folders whose names hold none."
        )


def _files(folder: Path, info: TraceInfo) -> list[Path]:
    """What the trace's JSON names, and that JSON; not what else lies there."""
    named = [part.name for part in info.parts]
    named += [info.vocabulary.name] if info.vocabulary else []
    described = sorted(
        path.name
        for path in folder.iterdir()
        if path.name == TRACE_NAME or RANK_NAME.fullmatch(path.name)
    )
    return [folder / name for name in (*described, *named)]


def _identity(info: TraceInfo) -> str:
    """A hash of what the trace holds: model, text, and every part."""
    texts = [info.model_sha256, info.data_fingerprint, *(part.sha256 for part in info.parts)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
