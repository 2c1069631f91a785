"""How records reach Weights & Biases, offline by default.

Offline is a folder run_dir/wandb/offline-run-* that `wandb sync` sends later. The run keeps its id
over resumes, its step is the optimiser step, and no step is in it twice. A finished run also has
its figures and, up to a size, its routing trace. wandb_run.py says what W&B is not told,
wandb_numbers.py which numbers it shows.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe.config import LoggingConfig
from moe.errors import UserError
from moe.progress_call import ProgressCall, no_progress
from moe.train.metrics import METRICS_FILE, Record, stream_metrics
from moe.train.wandb_numbers import (
    OVER_TOKENS,
    TOKENS,
    curves,
    load_ratios,
    shown_layers,
    summary,
)
from moe.train.wandb_pictures import CAPTION, load_histogram, load_picture
from moe.train.wandb_run import end_run, import_wandb, offline_folders, set_aside, start_run
from moe.train.wandb_trace import trace_artifact

_BEST = "best/validation_loss"
_SHARE_FOR_EARLIER = 0.05  # of the time of a run, for steps before it was resumed
_STOPPED_SECONDS = 20.0  # for them where a run is stopped: who stops it does not wait for long


class WandbSink:
    """Records as one W&B run; construct on rank 0 only, close to finish the run.

    resumed_step None is a fresh run. Otherwise it is the step of the loaded checkpoint, and what
    the run does not hold yet is filled in from run_dir/metrics.jsonl up to that step. Offline that
    is everything: one folder holds the whole run, and the folders of earlier processes, with steps
    that a kill has undone, then move to run_dir/wandb/replaced. Online the server keeps its
    history, and steps that it already has are not sent again. Filling in takes minutes for a long
    run and other ranks wait for this one: it takes a twentieth of the time between two records,
    which queue behind it, and close does the rest. A run that is stopped before has that rest, and
    its folders' move, when it is resumed again.

    Where final_step has been written, close adds what a finished run has to show: figures, called
    then, returns the pictures' paths by name, and trace_folder is its routing.

    Raises UserError when wandb is missing, when online has no key or cannot connect. Mode disabled
    writes nothing and needs no wandb.
    """

    may_fail = True

    def __init__(
        self,
        config: LoggingConfig,
        *,
        run_dir: str | Path,
        run_id: str,
        run_name: str,
        resolved_config: Mapping[str, Any],
        resumed_step: int | None = None,
        heat_map_every: int = 100,
        final_step: int | None = None,
        figures: Callable[[], Mapping[str, Path]] = dict,
        trace_folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        progress: ProgressCall = no_progress,
    ) -> None:
        self._config, self._final_step = config, final_step
        self._figures, self._trace_folder = figures, trace_folder
        self._run: Any = None
        self._heat_map_every = heat_map_every
        self._not_drawn: tuple[int, np.ndarray] | None = None  # newest load, its step
        self._last_drawn: int | None = None
        self._first_step, self._last_step = 0, resumed_step or 0
        self._best: float | None = None
        self._earlier: Iterator[Record] | None = None  # those that are not filled in yet
        self._queue: deque[tuple[int, Record]] = deque()
        self._clock, self._filled_at, self._progress = clock, clock(), progress
        self._replaced: list[Path] = []
        if config.wandb == "disabled":
            return
        self._wandb = import_wandb()
        earlier = offline_folders(run_dir, run_id)
        self._run = start_run(
            self._wandb, config, run_dir=run_dir, run_id=run_id, run_name=run_name,
            values=resolved_config,
        )  # fmt: skip
        self._define_axes()
        if config.wandb == "online":
            self._first_step = self._run.starting_step
        own = Path(self._run.dir).parent
        self._replaced = sorted(path for path in earlier if path.name != own.name)
        log = Path(run_dir) / METRICS_FILE
        if resumed_step is not None and log.exists():
            self._earlier = (r for r in stream_metrics(log) if r["step"] <= resumed_step)
        else:
            set_aside(self._replaced)

    def write(self, step: int, record: Record) -> None:
        """Log a record's numbers and, now and then, the load of its experts as pictures."""
        if self._run is None:
            return
        self._last_step = max(self._last_step, step)
        if self._earlier is None:
            self._log(step, record)
            return
        self._queue.append((step, record))
        now = self._clock()
        self._fill_in(until=now + _SHARE_FOR_EARLIER * (now - self._filled_at))
        self._filled_at = self._clock()

    def _fill_in(self, *, until: float) -> None:
        """Log earlier records until that time by the clock; after the last one, those queued."""
        while self._earlier is not None and self._clock() < until:
            record = next(self._earlier, None)
            self._progress(1)
            if record is not None:
                self._log(record["step"], record)
                continue
            self._earlier = None
            set_aside(self._replaced)
            while self._queue:
                self._log(*self._queue.popleft())

    def _log(self, step: int, record: Record) -> None:
        self._sum_up(record)
        if step < self._first_step:
            return
        values: dict[str, Any] = dict(curves(record))
        ratio_LE = load_ratios(record)
        if ratio_LE is not None:
            self._not_drawn = (step, ratio_LE)
            # counted from the last picture, because log_every need not divide heat_map_every
            if self._last_drawn is None or step - self._last_drawn >= self._heat_map_every:
                values |= self._draw()
        if values:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Log the last pictures, of a finished run its figures and trace too, and end the run."""
        if self._run is None:
            return
        run = self._run
        try:
            is_finished = self._final_step is not None and self._last_step >= self._final_step
            self._fill_in(until=math.inf if is_finished else self._clock() + _STOPPED_SECONDS)
            if self._not_drawn is not None:
                step, _ = self._not_drawn
                run.log(self._draw(), step=max(step, run.step))
            if is_finished:
                self._add_figures(run)
                self._add_trace(run)
        finally:
            self._run = None
            end_run(self._wandb, run)

    def _define_axes(self) -> None:
        self._run.define_metric(TOKENS, hidden=True)
        for names in OVER_TOKENS:
            self._run.define_metric(names, step_metric=TOKENS)

    def _sum_up(self, record: Record) -> None:
        """Keep the run table's own numbers: the best validation, and what validation is of.

        The minimum has a name of its own, because a sweep cannot optimise `validation/loss` once
        W&B is told to summarise it as a minimum.
        """
        loss = record.get("validation/loss")
        if not isinstance(loss, float):
            return
        if self._best is None or loss < self._best:
            self._best = loss
        self._run.summary.update(summary(record) | {_BEST: self._best})

    def _draw(self) -> dict[str, Any]:
        assert self._not_drawn is not None
        (step, ratio_LE), self._not_drawn = self._not_drawn, None
        self._last_drawn = step
        width = max(2, len(str(len(ratio_LE) - 1)))
        drawn = {
            f"layers/load/{layer:0{width}d}": self._histogram(ratio_LE[layer])
            for layer in shown_layers(len(ratio_LE))
        }
        drawn["router/load_histogram"] = self._histogram(ratio_LE)
        if _has("PIL"):
            caption = f"step {step}: {CAPTION}"
            drawn["router/load"] = self._wandb.Image(load_picture(ratio_LE), caption=caption)
        return drawn

    def _histogram(self, ratio: np.ndarray) -> Any:
        counts, edges = load_histogram(ratio)
        return self._wandb.Histogram(np_histogram=(counts, edges))

    def _add_figures(self, run: Any) -> None:
        images = {
            f"figures/{name}": self._wandb.Image(str(path), caption=name)
            for name, path in self._figures().items()
            if _has("PIL")
        }
        if images:
            run.log(images, step=max(self._last_step, run.step))

    def _add_trace(self, run: Any) -> None:
        if self._trace_folder is None or not self._config.upload_trace_mib:
            return
        try:
            artifact = trace_artifact(
                self._wandb, self._trace_folder, name=f"routing-{run.id}",
                limit_mib=self._config.upload_trace_mib,
            )  # fmt: skip
        except UserError as error:  # the run itself is whole without it
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            return
        run.log_artifact(artifact)


def _has(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
