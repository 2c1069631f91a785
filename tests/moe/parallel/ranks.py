"""Start a command once for each rank, as a launcher would, and wait for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def run_ranks(command: list[str], world_size: int, *, cwd: Path, timeout: float = 200.0) -> None:
    """Start the command once for each rank and wait for all; any failure ends all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(world_size):
        place = environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        with (cwd / f"rank{rank}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(command, cwd=cwd, env=place, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        for rank, process in enumerate(ranks):
            code = process.wait(timeout=timeout)
            assert code == 0, (cwd / f"rank{rank}.log").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
