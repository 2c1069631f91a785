"""One of the processes that the doctor starts: python sum_of_ranks.py BACKEND RANK SIZE FOLDER.

Prints the sum of rank + 1 over all of them, computed by a real all_reduce. They meet through a file
in FOLDER, so that no port has to be free.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

_SECONDS = 40.0


def sum_of_ranks(backend: str, *, rank: int, world_size: int, folder: Path) -> int:
    """Join the other processes, add up, leave."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=(folder / "meeting").absolute().as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_SECONDS),
    )
    total = torch.full((1,), rank + 1, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)


if __name__ == "__main__":
    name, own_rank, size, place = sys.argv[1:]
    print(sum_of_ranks(name, rank=int(own_rank), world_size=int(size), folder=Path(place)))
