"""One rank of train/test_upcycle.py: loads a dense model into each layout, writes what it has.

python upcycle_on_ranks.py DENSE OUTPUT LAYOUTS; LAYOUTS is a JSON list of the number of experts and
ParallelConfig's fields.
The launcher's environment says which rank this is.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rank_end import end_rank
from safetensors.torch import save_file
from upcycle_cases import SPARSE, TOKENS_BS, sparse_config

from moe.config import ParallelConfig
from moe.parallel.pieces import model_pieces, without_empty
from moe.parallel.processes import Processes, join_processes
from moe.train.build import build
from moe.train.checkpoint_writer import CheckpointWriter
from moe.train.init_from import load_initial_weights


def load(
    dense: str, output: Path, num_experts: int, layout: dict[str, Any], processes: Processes
) -> None:
    """Save what the engine holds as a checkpoint, and this rank's logits."""
    said: list[str] = []
    model = dataclasses.replace(SPARSE, num_experts=num_experts)
    config = sparse_config(dense, model=model, parallel=ParallelConfig(**layout))
    built = build(config, processes)
    load_initial_weights(built.engine, config, tokenizer_sha256="", say=said.append)
    assert any(line.startswith("upcycled: ") for line in said)
    pieces = list(without_empty(model_pieces(built.engine.held())))
    writer = CheckpointWriter(output, processes=processes, keep_last=1, in_background=False)
    writer.save(0, pieces={"model": pieces}, state={})
    writer.finish()
    built.model.eval()
    with torch.no_grad():
        made: Any = built.engine.forward(TOKENS_BS)
    save_file({"logits": made.logits}, output / f"rank{processes.rank}.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    processes = join_processes()
    for number, (num_experts, layout) in enumerate(json.loads(sys.argv[3])):
        load(sys.argv[1], Path(sys.argv[2]) / str(number), num_experts, layout, processes)
    end_rank(processes)


if __name__ == "__main__":
    main()
