"""A process of test_run_place.py: trains a few tiny runs, each in the folder that it is told.

usage: two_at_once.py DATA FOLDER SEED COUNT: a run for each FOLDER/<number>, whose names nobody
chose; each begins when the other process (FOLDER/ready_<number>_<seed>) is there too.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from moe.config import (
    DataConfig,
    LoggingConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PathsConfig,
    TrainConfig,
    WatchConfig,
)
from moe.train.run import run

MODEL = ModelConfig(
    vocab_size=512, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    intermediate_size=8, num_experts=4, max_position=32,
)  # fmt: skip
STEPS = 4


def config_of(data: Path, run_dir: Path, *, seed: int) -> TrainConfig:
    """A run of milliseconds that saves twice."""
    return TrainConfig(
        seed=seed, model=MODEL, data=DataConfig(seq_len=32, verify=False),
        optim=OptimConfig(warmup_steps=0),
        parallel=ParallelConfig(engine="plain"), logging=LoggingConfig(wandb="disabled"),
        watch=WatchConfig(enabled=False),
        train=LoopConfig(
            steps=STEPS, batch_size=2, micro_batch_size=2, precision="float32", evaluate_every=0,
            evaluate_tokens=100, save_every=2, sample_tokens=0,
        ),
        paths=PathsConfig(data_dir=str(data), run_dir=str(run_dir)),
    )  # fmt: skip


def main() -> None:
    """Train COUNT runs in step with the other process."""
    data, folder, seed, count = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
    for number in range(count):
        (folder / f"ready_{number}_{seed}").touch()
        while not all((folder / f"ready_{number}_{other}").exists() for other in (0, 1)):
            time.sleep(0.001)
        config = config_of(data, folder / f"run_{number}", seed=seed)
        run(config, say=lambda line: None, may_rename=True)


if __name__ == "__main__":
    main()
