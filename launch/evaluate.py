"""Measure how well a trained model predicts held-out text: loss, perplexity, bits per byte.

usage: python launch/evaluate.py run=FOLDER [key=value ...]

examples:
  python launch/evaluate.py run=runs/nano/2026-01-31_12-00-00
  python launch/evaluate.py run=runs/x paths.data_dir=data/mine output=runs/x/mine.json
  python launch/evaluate.py run=runs/x/checkpoints/step_00000100 split=train max_tokens=100000
run is a run folder (its newest good checkpoint) or one checkpoint's folder; the data are those it
was trained on, or paths.data_dir, made with the same tokenizer. max_tokens=0 reads every document.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from command import run_command
from tables import validation_table

from moe.errors import ConfigError
from moe.inference_config import EvaluateConfig
from moe.run_folder import find_run

if TYPE_CHECKING:
    pass


def evaluate(config: EvaluateConfig) -> None:
    """Load the run and its data, print the table, write the numbers where output says."""
    find_run(config.run)  # these two before torch is imported
    output = _output_path(config)
    from moe.data.shards import open_split
    from moe.evaluate import evaluate as measure
    from moe.load_run import load_run, pick_device
    from moe.parallel.processes import Processes
    from moe.train.atomic_files import replace_file

    device = pick_device(config.device)
    run = load_run(
        config.run, device=device, on_skip=lambda why: print(f"note: {why}", file=sys.stderr)
    )
    data_dir = config.paths.data_dir or run.config.paths.data_dir
    split = open_split(data_dir, config.split, verify=True)
    run.require_tokenizer_of(split, key="paths.data_dir")
    seq_len = run.window(config.seq_len)
    record = measure(
        run.model,
        split,
        seq_len=seq_len,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        precision=run.precision,
        processes=Processes(rank=0, world_size=1, device=device),
    )
    print(f"checkpoint: {run.checkpoint.folder}, step {run.checkpoint.step}")
    print(
        f"data: {data_dir}, {config.split}, {int(record['validation/tokens']):,} tokens predicted "
        f"in windows of {seq_len}"
    )
    for line in validation_table(record):
        print(line)
    if output is not None:
        about = {
            "checkpoint": str(run.checkpoint.folder),
            "step": run.checkpoint.step,
            "data_dir": data_dir,
            "data_fingerprint": split.manifest.fingerprint,
            "split": config.split,
            "seq_len": seq_len,
            "max_tokens": config.max_tokens,
            "precision": str(run.precision).removeprefix("torch."),
        }
        replace_file(output, json.dumps(about | record, indent=1).encode() + b"\n")
        print(f"output: {output}")


def _output_path(config: EvaluateConfig) -> Path | None:
    """Where the numbers go; refused now rather than after the evaluation."""
    if config.output is None:
        return None
    path = Path(config.output).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in {str(path.parent)!r}, which is no folder"
        raise ConfigError(
            f"output: got {config.output!r}, which {what}; give a file in a folder that exists, "
            "e.g. output=evaluation.json."
        )
    return path


if __name__ == "__main__":
    run_command(
        "evaluate",
        EvaluateConfig,
        evaluate,
        about=__doc__,
        writes="output",
        literal=("run", "output", "paths.data_dir"),
    )
