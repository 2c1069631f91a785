"""What a run's folder holds for pictures: its model, its metrics, its routing; without torch.

Traces of a run's checkpoints are looked for in <run>/traces/, where the notebooks say to put them;
the routing recorded in training lies in <run>/routing/.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config import RouterConfig
from moe.config_from_dict import from_dict
from moe.errors import ConfigError, DataError
from moe.model_config import ModelConfig
from moe.trace.read import Trace, open_trace, require_same_tokens
from moe.train.atomic_files import read_small_file
from moe.train.metrics import METRICS_FILE, Record, read_metrics

RUN_VARIABLE = "PHIMOE_RUN"
ROUTING_FOLDER, TRACES_FOLDER = "routing", "traces"
_CONFIG_LIMIT_BYTES = 2**20
_HOW_TO_TRAIN = "Train one with `make train`, or give the folder of another run."


@dataclass(frozen=True, eq=False)
class RunFiles:
    """A run whose configuration and metrics were read; records as moe.train.metrics has them."""

    folder: Path
    name: str
    model: ModelConfig
    router: RouterConfig
    seq_len: int
    metrics: list[Record]

    @property
    def mask_threshold(self) -> float | None:
        """SparseMixer's threshold; None for the other routers, which mask no expert."""
        return self.router.mask_threshold if self.router.name == "sparsemixer" else None

    def require_sparse(self) -> None:
        """Raise DataError for a dense model: it has no experts to look at."""
        if not self.model.is_sparse:
            raise DataError(
                f"run: {str(self.folder)!r} trained {self.model.name}, which is dense: it has no "
                "experts, so there is no routing to show. Give a run whose model has "
                "model.num_experts above 0, or look at it in dense_and_sparse.ipynb."
            )


def find_run_folder(
    run: str | Path | None = None, *, runs: str | Path = "runs",
    environment: Mapping[str, str] = os.environ,
) -> Path:  # fmt: skip
    """The folder given, else that of PHIMOE_RUN, else the newest with a metrics.jsonl below runs.

    Relative paths are of the working directory, or else of the repository, in whose analysis/
    folder a notebook's server may have been started. Raises DataError where there is none.
    """
    asked, key = (run, "RUN") if run else (environment.get(RUN_VARIABLE), RUN_VARIABLE)
    if asked:
        folder = _existing(asked)
        if folder is None or not (folder / METRICS_FILE).is_file():
            what = "does not exist" if folder is None else f"holds no {METRICS_FILE}"
            raise DataError(
                f"{key}: {str(asked)!r} {what} (working directory {Path.cwd()}). It must be a run "
                f"folder, which launch/train.py prints at its end. {_HOW_TO_TRAIN}"
            )
        return folder
    below = _existing(runs)
    found = [] if below is None else [path.parent for path in below.glob(f"**/{METRICS_FILE}")]
    if not found:
        raise DataError(
            f"RUN: not given, and there is no run below {str(runs)!r} (working directory "
            f"{Path.cwd()}). {_HOW_TO_TRAIN} Set RUN in the first cell, or {RUN_VARIABLE}."
        )
    return max(found, key=lambda folder: (folder / METRICS_FILE).stat().st_mtime)


def open_run(folder: str | Path) -> RunFiles:
    """Read a run folder's config.json and metrics.jsonl. Raises DataError naming the file."""
    folder = Path(folder)
    path = folder / "config.json"
    try:
        config = json.loads(read_small_file(path, limit_bytes=_CONFIG_LIMIT_BYTES))
        model = from_dict(ModelConfig, config["model"], path="model")
        router = from_dict(RouterConfig, config["router"], path="router")
        name, seq_len = str(config["name"]), int(config["data"]["seq_len"])
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Give the folder of a run of "
            "launch/train.py."
        ) from None
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: is not the configuration of a run of this version ({error}). Restore it."
        ) from None
    return RunFiles(folder, name, model, router, seq_len, read_metrics(folder / METRICS_FILE))


def recorded_routing(run: RunFiles) -> Trace:
    """The routing that the run recorded while it trained (train.trace_every)."""
    run.require_sparse()
    folder = run.folder / ROUTING_FOLDER
    if not folder.is_dir():
        raise DataError(
            f"run: {str(run.folder)!r} recorded no routing in training (it has no "
            f"{ROUTING_FOLDER}/). Train with train.trace_every=10, or another number of steps."
        )
    trace = open_trace(folder)
    if trace.info.num_tokens == 0:
        raise DataError(
            f"{folder}: no step is recorded yet. Wait for one of every train.trace_every steps."
        )
    return _of_this_model(run, trace)


def checkpoint_traces(run: RunFiles) -> list[tuple[int, Trace]]:
    """(step, trace) of each finished trace of a checkpoint below <run>/traces, by step; or none."""
    run.require_sparse()
    folders = sorted((run.folder / TRACES_FOLDER).glob("*/trace.json"))
    traces = [_of_this_model(run, open_trace(path.parent)) for path in folders]
    return sorted(((_step_of(trace), trace) for trace in traces), key=lambda pair: pair[0])


def traces_to_compare(run: RunFiles) -> list[tuple[int, Trace]]:
    """checkpoint_traces of two steps or more over the same tokens: the most that are.

    Raises DataError naming the command that makes them.
    """
    groups: list[dict[int, Trace]] = []
    for step, trace in checkpoint_traces(run):
        group = next((g for g in groups if _has_same_tokens(g, trace)), None)
        if group is None:
            groups.append({step: trace})
        else:
            group[step] = trace
    most = max(groups, key=len, default={})
    if len(most) < 2:
        raise DataError(
            f"run: {str(run.folder)!r} has traces of {len(most)} checkpoint(s) over the same "
            "tokens; comparing needs two or more. Train with train.keep_last=10 or more, so that "
            "checkpoints are still there, and trace them with\n"
            f"{checkpoint_traces_command(run)}"
        )
    return sorted(most.items())


def routing_to_show(
    run: RunFiles, trace: str | Path | None = None, *, num_steps: int = 10
) -> tuple[Trace, str]:
    """The trace given, else the last checkpoint's, else the run's last recorded steps; and a line.

    The line says what the trace is of. Raises DataError where there is none of the three, naming
    the command that makes one.
    """
    run.require_sparse()
    if trace:
        opened = _of_this_model(run, open_trace(_existing(trace) or Path(trace)))
        return opened, _said(opened)
    traces = checkpoint_traces(run)
    if traces:
        return traces[-1][1], _said(traces[-1][1])
    if not (run.folder / ROUTING_FOLDER).is_dir():
        raise DataError(
            f"run: {str(run.folder)!r} has no trace of its routing. Make one with\n"
            f"{trace_command(run)}"
        )
    last = last_steps(recorded_routing(run), num_steps=num_steps)
    return last, _said(last)


def trace_command(run: RunFiles) -> str:
    """The command that traces the run's newest checkpoint to where the notebooks look for it."""
    target = run.folder / TRACES_FOLDER / "last"
    return f"python launch/trace.py run={run.folder} target={target} logits=true"


def checkpoint_traces_command(run: RunFiles) -> str:
    """The command that traces every checkpoint of the run to where the notebooks look for them."""
    target = f"{run.folder / TRACES_FOLDER}/$(basename $step)"
    return (
        f"for step in {run.folder}/checkpoints/step_*; do\n"
        f"  python launch/trace.py run=$step target={target} logits=true; done"
    )


def last_steps(trace: Trace, *, num_steps: int) -> Trace:
    """Of a training run's trace the last recorded steps alone; another trace as it is."""
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}; it must be at least 1.")
    if not trace.info.layout.has_steps:
        return trace
    wanted = set(trace.info.steps[-num_steps:])
    parts = tuple(part for part in trace.info.parts if part.step in wanted)
    return dataclasses.replace(trace, info=dataclasses.replace(trace.info, parts=parts))


def _said(trace: Trace) -> str:
    info = trace.info
    of_domains = zip(info.domains, info.tokens_of_domain, strict=True)
    domains = ", ".join(f"{name} {tokens:,}" for name, tokens in of_domains)
    size = f"{info.num_tokens:,} tokens of {info.num_documents:,} documents ({domains})"
    if info.layout.has_steps:
        steps = info.steps
        return (
            f"training steps {steps[0]:,} to {steps[-1]:,}, {len(steps)} of them recorded, with "
            f"the choices that training sampled: {size}"
        )
    logits = "with" if info.has_logits else "without"
    of_what = f"the checkpoint of step {_step_of(trace):,} on {info.setting('split')} text"
    return f"{of_what}: {size}, {logits} logits"


def _step_of(trace: Trace) -> int:
    step = trace.info.setting("step")
    return step if isinstance(step, int) else 0


def _has_same_tokens(group: dict[int, Trace], trace: Trace) -> bool:
    try:
        require_same_tokens(next(iter(group.values())), trace)
    except DataError:
        return False
    return True


def _of_this_model(run: RunFiles, trace: Trace) -> Trace:
    info, model = trace.info, run.model
    of_trace: dict[str, Any] = {
        "layers": info.num_layers, "experts": info.num_experts, "choices a token": info.top_k
    }  # fmt: skip
    of_run: dict[str, Any] = {
        "layers": model.num_layers, "experts": model.num_experts, "choices a token": model.top_k
    }  # fmt: skip
    if not info.layout.has_steps:
        of_trace["router"], of_run["router"] = info.setting("router"), run.router.name
    for name, value in of_run.items():
        if of_trace[name] != value:
            raise DataError(
                f"{trace.folder}: is the trace of another model: {name}: {of_trace[name]}, and "
                f"{value} in the run {str(run.folder)!r}. Trace this run with\n"
                f"{trace_command(run)}"
            )
    return trace


def _existing(path: str | Path) -> Path | None:
    path = Path(path).expanduser()
    repository = Path(__file__).resolve().parents[1]
    places = [path] if path.is_absolute() else [path, repository / path]
    return next((place for place in places if place.is_dir()), None)
