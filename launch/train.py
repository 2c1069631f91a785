"""Train a model on prepared text; the run folder holds all that comes of it.

usage: python launch/train.py [experiment=NAME] [group=option ...] [key=value ...]

examples:
  python launch/train.py experiment=nano
  python launch/train.py model=tiny_dense optim.lr=1e-3 train.steps=500 paths.run_dir=runs/dense
  python launch/train.py -m experiment=nano seed=0,1,2
The same command with the same paths.run_dir goes on from its newest checkpoint.
"""

from __future__ import annotations

from command import run_command
from tables import load_line, validation_table

from moe.config import TrainConfig


def train(config: TrainConfig) -> None:
    """Train, then show the numbers, a sample and a picture of the run."""
    _refuse_early(config)
    from moe.train.run import run

    summary = run(config, say=lambda line: print(line, flush=True))
    if not summary.is_first:
        return
    from analysis.plots import run_picture

    picture = summary.run_dir / "run.png"
    run_picture(summary.metrics, title=config.name, path=picture)
    if summary.sample:
        print(f"\nsample:\n{summary.sample}\n")
    validations = [record for record in summary.metrics if record.get("kind") == "validation"]
    for line in validation_table(validations[-1]) if validations else []:
        print(line)
    for line in load_line(summary.metrics):
        print(line)
    print(f"picture: {picture}\nrun folder: {summary.run_dir}")


def _refuse_early(config: TrainConfig) -> None:
    """Answer the most common mistakes before torch is imported, which takes seconds."""
    from moe.data.manifest import read_manifest
    from moe.parallel.launcher import read_launch

    config.check_processes(read_launch().world_size)
    read_manifest(config.paths.data_dir, verify=False)


if __name__ == "__main__":
    run_command(
        "train",
        TrainConfig,
        train,
        about=__doc__,
        writes="paths.run_dir",
        on_interrupt=(
            "interrupted. The same command with the same paths.run_dir goes on from the last save."
        ),
    )
