"""Ranks that agree, join and make their expert groups, each a process; not a test.

Usage: start_many_ranks.py WORLD_SIZE EXPERT_PARALLEL. The ranks are forked after torch is imported,
so that hundreds have room; they meet at a real store and make real gloo groups, whose connections
are opened when they are used. Prints JSON: for each rank the sizes of the groups whose members it
waited for, and the most seconds of a rank to agree, to join and to make its groups.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moe.parallel.agree import Place, agree
from moe.parallel.expert_parallel import make_expert_groups
from moe.parallel.launcher import Launch
from moe.parallel.processes import Processes

PATIENCE = timedelta(seconds=300)


def start(rank: int, world_size: int, size: int, port: int) -> None:
    waits: list[int] = []
    barrier = distributed_c10d._store_based_barrier

    def counted(own, store, name, members, *rest, **named):  # type: ignore[no-untyped-def]
        waits.append(members)
        return barrier(own, store, name, members, *rest, **named)

    distributed_c10d._store_based_barrier = counted
    began = time.monotonic()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    place = Place(f"host{rank // 8}", "cpu", "", str(torch.__version__))
    agree(store, Launch(rank, world_size, rank % 8), place, asked="auto")
    agreed = time.monotonic()
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("phimoe", store), rank=rank, world_size=world_size,
        timeout=PATIENCE,
    )  # fmt: skip
    joined = time.monotonic()
    make_expert_groups(size, Processes(rank, world_size, torch.device("cpu")))
    seconds = [agreed - began, joined - agreed, time.monotonic() - joined]
    store.set(f"report/{rank}", json.dumps([waits, seconds]))
    store.wait(["over"], PATIENCE)  # nobody leaves while another still makes its groups


def serve(port: Connection) -> None:
    """The store, in a process of its own: a fork of its threads could stand still."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    port.send(server.port)
    port.recv()


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(world_size: int, size: int) -> None:
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"  # as NCCL's groups wait for their members
    own, other = Pipe()
    server = forked(lambda: serve(other))
    port = own.recv()
    ranks = [
        forked(lambda rank=rank: start(rank, world_size, size, port)) for rank in range(world_size)
    ]
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    reports = [json.loads(store.get(f"report/{rank}")) for rank in range(world_size)]
    store.set("over", "")
    ends = [os.waitpid(child, 0)[1] for child in ranks]
    own.send("over")
    os.waitpid(server, 0)
    assert ends == [0] * world_size
    seconds = [max(report[1][part] for report in reports) for part in range(3)]
    print(json.dumps({"waits": [report[0] for report in reports], "seconds": seconds}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
