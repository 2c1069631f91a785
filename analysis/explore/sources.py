"""Which run or trace a folder holds, what there is to show of it, and in which words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.explore.run_log import RunLog, read_log
from moe.errors import ConfigError, DataError
from moe.trace.info import PROGRESS_NAME, RANK_NAME, TRACE_NAME, TraceInfo
from moe.trace.read import Trace, open_trace
from moe.train.atomic_files import read_small_file
from moe.train.metrics import METRICS_FILE, read_metrics

ROUTING_FOLDER = "routing"  # of a run folder, where train.trace_every records
_LIMIT_BYTES = 16 * 2**20


@dataclass(frozen=True, eq=False)
class Source:
    """A run with or without a trace, or a trace alone."""

    title: str
    facts: tuple[tuple[str, str], ...]
    run: Path | None
    log: RunLog | None
    trace: Trace | None
    note: str = ""


def find_source(folder: str, *, trace: str = "", key: str = "run") -> Source:
    """What a folder holds: a run (with the trace given, or its routing/), or a trace.

    Raises ConfigError for a dense model and where there is nothing of experts, DataError for a
    folder that is neither and for a trace that is not whole; key is what the user calls it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise DataError(
            f"{key}: {folder!r} {what} (working directory {Path.cwd()}). Give the folder of a run, "
            "which launch/train.py prints at its end, or of a trace, which launch/trace.py wrote."
        )
    if _is_trace(path):
        return _of_trace(path)
    if not (path / METRICS_FILE).is_file():
        raise DataError(
            f"{key}: {folder!r} holds no {METRICS_FILE} and no {TRACE_NAME}, so it is neither a "
            "run nor a trace. Give a run folder (not its checkpoints/), or a trace."
        )
    return _of_run(path, trace=trace, key=key)


def _of_trace(folder: Path) -> Source:
    trace = _opened(folder)
    return Source(_name(folder), _facts_of_trace(trace), None, None, trace)


def _of_run(folder: Path, *, trace: str, key: str) -> Source:
    config = _read_config(folder)
    model = config.get("model", {})
    if model.get("num_experts") == 0:
        raise ConfigError(
            f"{key}: {str(folder)!r} is of {model.get('name')}, a dense model: it has no experts, "
            "so there is nothing to explore. Give a run whose model has model.num_experts above 0."
        )
    log = read_log(read_metrics(folder / METRICS_FILE))
    opened, note = _trace_of_run(folder, trace)
    if opened is None and not log.has_routing:
        raise DataError(
            f"{key}: {folder / METRICS_FILE} has no step with expert loads (router/load_LE), and "
            f"there is no trace. Train at least one step, or make a trace: {_command(folder)}"
        )
    if opened is not None:
        _require_shape(opened, model, folder)
    facts = [*_facts_of_run(config, log), *(_facts_of_trace(opened) if opened else ())]
    named = dict(reversed(facts))  # of a name twice, what the run says
    in_order = dict(facts)
    return Source(
        _name(folder), tuple((name, named[name]) for name in in_order), folder, log, opened, note
    )


def _trace_of_run(folder: Path, trace: str) -> tuple[Trace | None, str]:
    """The trace that was given, or the one recorded in training, or none and what makes one."""
    if trace:
        return _opened(Path(trace).expanduser()), ""
    routing = folder / ROUTING_FOLDER
    if routing.is_dir() and _is_trace(routing):
        opened = open_trace(routing)
        if opened.info.num_tokens:
            return opened, ""
    return None, (
        f"{folder} has no recorded routing, so this page shows its training log alone. To see "
        f"tokens, domains and partners, make a trace: {_command(folder)} and start this page with "
        "run and trace."
    )


def _require_shape(trace: Trace, model: dict[str, Any], run: Path) -> None:
    for name in ("num_layers", "num_experts", "top_k"):
        found = getattr(trace.info, name)
        if model.get(name, found) != found:
            raise DataError(
                f"trace: the one in {str(trace.folder)!r} is of another model than {run}: {name} "
                f"is {found}, and {model[name]} in the run. Give the run that was traced, or the "
                "trace alone."
            )


def _opened(folder: Path) -> Trace:
    trace = open_trace(folder)
    info = trace.info
    if not info.num_tokens:
        raise DataError(f"trace: the one in {str(folder)!r} has no tokens; trace some text first.")
    empty = [d for d, n in zip(info.domains, info.tokens_of_domain, strict=True) if n == 0]
    asked = info.setting("domains") or ()
    if any(domain in asked for domain in empty):
        raise DataError(
            f"trace: the one in {str(folder)!r} was asked for domain {empty[0]!r} and has no "
            "tokens of it. Trace text that has some, or leave the domain out."
        )
    return trace


def _is_trace(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    return any(n in (TRACE_NAME, PROGRESS_NAME) or RANK_NAME.fullmatch(n) for n in names)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(read_small_file(path, limit_bytes=_LIMIT_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Restore it from a copy.") from None
    return found if isinstance(found, dict) else {}


def _facts_of_run(config: dict[str, Any], log: RunLog) -> list[tuple[str, str]]:
    model, router = config.get("model", {}), config.get("router", {})
    facts = []
    if model:
        facts.append(("model", _shape(model.get("name"), model.get("num_layers"),
                      model.get("num_experts"), model.get("top_k"))))  # fmt: skip
    if router:
        facts.append(("router", str(router.get("name"))))
    if log.has_routing:
        facts.append(("training log", f"{_steps(log.step_S.tolist())}, {len(log.step_S):,} logged"))
    return facts


def _facts_of_trace(trace: Trace) -> tuple[tuple[str, str], ...]:
    info = trace.info
    shares = [f"{d} {n / info.num_tokens:.0%}" for d, n in
              zip(info.domains, info.tokens_of_domain, strict=True) if n]  # fmt: skip
    empty = [d for d, n in zip(info.domains, info.tokens_of_domain, strict=True) if not n]
    empties = f"; without a token: {', '.join(empty)}" if empty else ""
    return (
        ("model", _shape(info.setting("model"), info.num_layers, info.num_experts, info.top_k)),
        ("router", str(info.setting("router") or "not said")),
        ("trace", f"{info.num_tokens:,} tokens of {info.num_documents:,} documents, "
                  f"{_kind(info)}"),
        ("domains", ", ".join(shares) + empties),
        ("SHA-256", f"model {info.model_sha256[:12]}, data {info.data_fingerprint[:12]}"),
    )  # fmt: skip


def _kind(info: TraceInfo) -> str:
    if info.layout.has_steps:
        return f"recorded in training at {_steps(info.steps)}"
    step = info.setting("step")
    return "read by a finished model" if step is None else f"read by the model of step {step:,}"


def _shape(name: object, layers: object, experts: object, top_k: object) -> str:
    return f"{name or 'not named'}: {layers} layers of {experts} experts, {top_k} a token"


def _steps(steps: Any) -> str:
    return f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"


def _name(folder: Path) -> str:
    """The last two names of its path, which tell runs apart; of routing/, those of its run."""
    resolved = folder.resolve()
    parts = [p for p in resolved.parts if p != resolved.anchor]
    parts = parts[:-1] if parts[-1:] == [ROUTING_FOLDER] else parts
    return "/".join(parts[-2:]) or "/"


def _command(folder: Path) -> str:
    return f"python launch/trace.py run={folder} target=traces/{folder.name}"
