"""Which pictures a finished run is shown by: run.png, and what its experts are chosen for.

The second is drawn where the run recorded its routing (train.trace_every) in several domains. Both
lie in the run folder, and W&B has them under figures/.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.trace.read import Trace

_TOKENS = 200_000  # of the last recorded steps: routing as the run ends, and a second to count


def draw_figures(run_dir: Path, *, metrics: list[dict[str, Any]], title: str) -> dict[str, Path]:
    """Draw the run's pictures and return their paths by name; metrics are its log's records."""
    from analysis.plots import run_picture
    from moe.trace.record import ROUTING_FOLDER

    drawn = {"run": run_picture(metrics, title=title, path=run_dir / "run.png")}
    if (run_dir / ROUTING_FOLDER).is_dir():
        drawn |= _draw_domains(run_dir / ROUTING_FOLDER, run_dir / "domains.png")
    return drawn


def _draw_domains(folder: Path, path: Path) -> dict[str, Path]:
    from analysis.adding import total
    from analysis.count_trace import count_steps
    from analysis.figure_maps import domain_map
    from analysis.specialisation import lift
    from moe.errors import DataError
    from moe.trace.read import open_trace

    try:
        trace = _last_steps(open_trace(folder))
        if len(trace.info.domains) < 2 or not trace.info.parts:
            return {}
        counts = total(count_steps(trace).values())
    except DataError:
        return {}  # a damaged trace is said by whoever asks for it
    steps = trace.info.steps
    title = f"What experts are chosen for, steps {steps[0]} to {steps[-1]}"
    domain_map(lift(counts.load_LDE), trace.info.domains, title=title).savefig(
        path, bbox_inches="tight"
    )
    return {"domains": path}


def _last_steps(trace: Trace) -> Trace:
    """The newest recorded steps of about _TOKENS tokens, at least one."""
    info, first, num_tokens = trace.info, None, 0
    for step in reversed(info.steps):
        of_step = sum(part.num_tokens for part in info.parts if part.step == step)
        if first is not None and num_tokens + of_step > _TOKENS:
            break
        first, num_tokens = step, num_tokens + of_step
    parts = tuple(part for part in info.parts if first is not None and part.step >= first)
    return dataclasses.replace(trace, info=dataclasses.replace(info, parts=parts))
