"""Trace the routing of a trained model over text: which experts every token takes, and how much.

usage: python launch/trace.py run=FOLDER target=FOLDER [key=value ...]

examples:
  python launch/trace.py run=runs/nano/2026-01-31_12-00-00 target=traces/nano
  python launch/trace.py run=models/phi35_moe data_dir=data/mine target=traces/phi max_tokens=100000
  python launch/trace.py run=runs/x/checkpoints/step_00000100 target=traces/x_100 logits=true
run is a run folder (its newest good checkpoint), one checkpoint's folder, or a converted model; the
text is what it was trained on, or data_dir, made with the same tokenizer. Every document is run
from its start, cut to seq_len tokens. An interrupted trace goes on when it is started again.
The target holds Parquet files, a row a token, and trace.json; moe.trace.read opens it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from command import run_command

from moe.errors import ConfigError
from moe.run_folder import find_run
from moe.trace_config import TraceConfig

if TYPE_CHECKING:
    from moe.trace.corpus import Traced


def trace(config: TraceConfig) -> None:
    """Load the run and its data, write the trace, say what was written and what it cost."""
    find_run(config.run)  # these two before torch is imported
    if not config.target:
        raise ConfigError(
            "target: not given; give a new folder for the trace, e.g. target=traces/nano."
        )
    from moe.data.shards import open_split
    from moe.load_run import load_run, pick_device
    from moe.trace.corpus import trace_corpus
    from moe.train.progress import progress_bar

    run = load_run(config.run, device=pick_device(config.device), on_skip=_notice)
    data_dir = config.data_dir or run.config.paths.data_dir
    split = open_split(data_dir, config.split, verify=True)
    print(f"checkpoint: {run.checkpoint.folder}, step {run.checkpoint.step}")
    print(f"data: {data_dir}, {config.split}", flush=True)
    with progress_bar("trace") as on_progress:
        done = trace_corpus(config, run, split, on_progress=on_progress, on_note=_notice)
    for line in _report(config, done):
        print(line)


def _report(config: TraceConfig, done: Traced) -> list[str]:
    info = done.info
    size = (
        f"{info.num_tokens:,} tokens of {info.num_documents:,} documents, {info.num_layers} "
        f"layers, {len(info.parts)} part(s), {info.num_bytes:,} bytes"
    )
    if done.was_finished:
        return [f"finished before: {config.target} holds all of it, verified: {size}"]
    lines = [f"trace: {config.target}, {size}"]
    if done.resumed_tokens:
        lines.append(f"resumed: {done.resumed_tokens:,} of these tokens were there already")
    waiting = sum(part.handover_seconds for part in info.parts)
    writing = sum(part.writer_seconds for part in info.parts)
    lines.append(
        f"recording cost: {info.overhead:.2%} of the forward pass ({info.forward_seconds:.2f} s): "
        f"{waiting:.3f} s of waiting and {writing:.3f} s of a core beside it"
    )
    return lines


def _notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(
        "trace",
        TraceConfig,
        trace,
        about=__doc__,
        writes="target",
        literal=("run", "target", "data_dir"),
        on_interrupt="interrupted. The same command goes on from the last whole part.",
    )
