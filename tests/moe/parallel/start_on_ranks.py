"""One rank of test_partitioned_start.py: builds a model for ZeRO 3; says what it held meanwhile.

python start_on_ranks.py OUTPUT_DIR; the launcher's environment says which rank this is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rank_end import end_rank
from safetensors.torch import save_file
from torch import nn
from train_on_ranks import Case, config_of, held_tensors

from moe.model import init
from moe.model.init import KeptPart
from moe.model.transformer import build_model
from moe.parallel.engine import make_engine, module_partitioner
from moe.parallel.expert_parallel import ExpertParallelDispatcher, make_expert_groups
from moe.parallel.processes import join_processes
from moe.sparse.dispatch import Placement


def main() -> None:
    output = Path(sys.argv[1])
    torch.set_num_threads(1)
    processes = join_processes()
    config = config_of(Case(name="start", micro_batch_size=4, zero_stage=3, expert_parallel_size=2))
    groups = make_expert_groups(2, processes)
    partition = module_partitioner(config.parallel, processes, groups)
    assert partition is not None
    # so small that parts are of several blocks, and some of what a rank holds of a parameter
    init.BLOCK_NUMBERS = 100
    held: list[int] = []
    seen: list[nn.Parameter] = []

    def when_ready(module: nn.Module) -> Mapping[str, KeptPart]:
        """Count the elements that exist on this rank just before and just after partitioning."""
        seen.extend(module.parameters(recurse=False))
        held.append(count())
        kept = partition(module)
        held.append(count())
        return kept

    def count() -> int:
        parts = [p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0 for p in seen]
        return sum(parts) + sum(p.numel() for p in seen)

    draw, drawn = init._draw, [0]

    def count_drawn(label: str, size: int) -> torch.Tensor:
        drawn[0] += size
        return draw(label, size)

    init._draw = count_drawn
    model = build_model(
        config.model, config.router, seed=3, when_ready=when_ready,
        placement=Placement(groups.held(8), ExpertParallelDispatcher(groups)),
    )  # fmt: skip
    engine = make_engine(model, config.optim, config.parallel, processes, groups)
    save_file(held_tensors(engine), output / f"rank{processes.rank}.safetensors")
    (output / f"rank{processes.rank}.json").write_text(json.dumps([held, drawn[0]]))
    end_rank(processes)


if __name__ == "__main__":
    main()
