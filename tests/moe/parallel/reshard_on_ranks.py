"""One rank of test_reshard.py: saves in every layout of its world, or loads what others saved.

python reshard_on_ranks.py DATA_DIR SAVES_DIR OUTPUT TASKS; a task without sources trains from the
start and saves twice, one step apart; one with sources loads each of these, saves it again, takes
one step and saves. The launcher's environment says which rank this is.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rank_end import end_rank
from train_on_ranks import Case, config_of

from moe.config import TrainConfig
from moe.data.loader import training_batches
from moe.data.shards import open_split
from moe.parallel.pieces import model_pieces, optimizer_pieces, without_empty
from moe.parallel.processes import Processes, join_processes
from moe.train.build import Built, build
from moe.train.checkpoint import Checkpoint, open_checkpoint
from moe.train.checkpoint_writer import CheckpointWriter
from moe.train.loop import train_step
from moe.train.optim import learning_rate
from moe.train.state import TrainState

SAVED_STEP = 3


@dataclasses.dataclass(frozen=True)
class Task:
    """One layout, and the layouts whose checkpoints it loads."""

    name: str
    expert_parallel_size: int
    zero_stage: int
    sources: tuple[str, ...] = ()


class Trainer:
    """A model in one layout, trained step by step."""

    def __init__(self, task: Task, data_dir: Path, processes: Processes) -> None:
        self.processes = processes
        self.config: TrainConfig = config_of(
            Case(
                name=task.name,
                micro_batch_size=8 // processes.world_size,
                expert_parallel_size=task.expert_parallel_size,
                zero_stage=task.zero_stage,
            )
        )
        self.built: Built = build(self.config, processes)
        config = self.config
        self.batches = list(
            training_batches(
                open_split(data_dir, "train", verify=False),
                seed=config.seed,
                seq_len=config.data.seq_len,
                batch_size=config.train.batch_size,
                micro_batch_size=config.train.micro_batch_size,
                start_step=0,
                num_steps=SAVED_STEP + 1,
                rank=processes.rank,
                world_size=processes.world_size,
                num_workers=0,
            )
        )

    def step(self, number: int) -> dict[str, float]:
        lr = learning_rate(number, config=self.config.optim, num_steps=self.config.train.steps)
        state = TrainState(run_id="0", precision="float32", step=number)
        result = train_step(
            self.config,
            self.built.engine,
            self.batches[number],
            lr=lr,
            state=state,
            processes=self.processes,
        )
        return {"loss": result.loss, "grad_norm": result.grad_norm}

    def save(self, root: Path, step: int) -> None:
        held = self.built.engine.held()
        writer = CheckpointWriter(
            root, processes=self.processes, keep_last=9, in_background=step == SAVED_STEP
        )
        writer.save(
            step,
            pieces={
                "model": list(without_empty(model_pieces(held))),
                "optimizer": list(without_empty(optimizer_pieces(held))),
            },
            state={},
        )
        writer.finish()


class CountedReads:
    """Reads a checkpoint, and counts the elements of parameters that it has read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self.num_elements = checkpoint, 0

    def read_range(self, stem: str, name: str, start: int, into: torch.Tensor) -> None:
        self.num_elements += into.numel() if stem == "model" else 0
        self._checkpoint.read_range(stem, name, start, into)


def run_task(
    task: Task, data_dir: Path, saves: Path, output: Path, processes: Processes
) -> dict[str, Any]:
    trainer = Trainer(task, data_dir, processes)
    if not task.sources:
        for number in range(SAVED_STEP):
            trainer.step(number)
        trainer.save(saves / task.name, SAVED_STEP)
        record: dict[str, Any] = {"next": trainer.step(SAVED_STEP)}
        trainer.save(saves / task.name, SAVED_STEP + 1)
        return record
    record = {}
    for source in task.sources:
        checkpoint = open_checkpoint(saves / source / f"step_{SAVED_STEP:08d}", processes=processes)
        counted = CountedReads(checkpoint)
        trainer.built.engine.load(counted.read_range, with_moments=True)
        num_read = int(processes.sum(torch.tensor(counted.num_elements)))
        root = output / f"{task.name}-from-{source}"
        trainer.save(root, SAVED_STEP)
        record[source] = trainer.step(SAVED_STEP)
        trainer.save(root, SAVED_STEP + 1)
        if processes.is_first:
            record[source] |= {"num_read": num_read}
            record[source] |= compare(root, saves / source)
            shutil.rmtree(root)
        processes.barrier()
    return record


def compare(mine: Path, source: Path) -> dict[str, Any]:
    """Names whose bits differ when loaded and saved again; the worst difference a step later."""
    loaded, saved = (open_checkpoint(r / f"step_{SAVED_STEP:08d}") for r in (mine, source))
    differing = []
    for stem in ("model", "optimizer"):
        ours, theirs = loaded.hashes(stem), saved.hashes(stem)
        differing += [n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]
    later, expected = (open_checkpoint(r / f"step_{SAVED_STEP + 1:08d}") for r in (mine, source))
    worst = 0.0
    for stem in ("model", "optimizer"):
        ours, theirs = later.tensors(stem), expected.tensors(stem)
        for name, tensor in theirs.items():
            error = (ours[name].double() - tensor.double()).abs().max() / tensor.abs().max()
            worst = max(worst, float(error))
    shapes = {name: list(record.shape) for name, record in loaded.table("model").items()}
    return {"differing": differing, "worst": worst, "shapes": shapes}


def main() -> None:
    data_dir, saves, output = (Path(argument) for argument in sys.argv[1:4])
    torch.set_num_threads(1)
    processes = join_processes()
    for fields in json.loads(sys.argv[4]):
        task = Task(**fields)
        record = run_task(task, data_dir, saves, output, processes)
        if processes.is_first:
            (output / f"{task.name}.json").write_text(json.dumps(record))
    end_rank(processes)


if __name__ == "__main__":
    main()
