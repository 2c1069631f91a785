"""Which process this is, and the sums over all of them; one process needs no process group."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moe.errors import UserError
from moe.parallel.agree import agree, own_place, require_device
from moe.parallel.launcher import Launch, read_launch

_MEETING_SECONDS = 300.0  # ranks of one start may come this much apart: imports from slow disks


class LaunchError(UserError):
    """The ranks could not be brought together."""


@dataclass(frozen=True)
class Processes:
    """This process's place among the data-parallel ranks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of tensor over all ranks (a new tensor where there are several)."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def from_first(self, value: str) -> str:
        """Return rank 0's value on every rank."""
        return self.all_texts(value if self.is_first else "")[0]

    def tensor_from_first(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor, which has this one's shape, on every rank."""
        if self.world_size == 1:
            return tensor
        received = tensor.clone()
        dist.broadcast(received, src=0)
        return received

    def all_texts(self, text: str) -> list[str]:
        """Return every rank's text, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [text]
        own = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())], device=self.device)
        lengths = [torch.empty_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length)
        sizes = [int(length) for length in lengths]
        padded = torch.zeros(max(*sizes, 1), dtype=torch.uint8, device=self.device)
        padded[: sizes[self.rank]] = own[: sizes[self.rank]].to(self.device)
        texts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(texts, padded)
        pairs = zip(texts, sizes, strict=True)
        return [bytes(raw[:size].cpu().numpy()).decode() for raw, size in pairs]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


def join_processes(*, patience_seconds: float = 600.0, device: str = "auto") -> Processes:
    """Read the launcher's environment (torchrun sets it) and join the process group, if any.

    CUDA processes talk over NCCL, CPU processes over gloo. patience_seconds: how long a collective
    waits for the others before it fails. device: one of DEVICE_NAMES, the same kind on every rank.
    Raises ConfigError, naming the ranks, where they are not alike or one has no such device.
    """
    launch = read_launch()
    place = own_place(launch, device)
    if launch.world_size > 1 and not dist.is_initialized():
        store = _meet(launch)
        agree(store, launch, place, asked=device)
        store.set_timeout(timedelta(seconds=patience_seconds))
        dist.init_process_group(
            "gloo" if place.device == "cpu" else "nccl",
            store=PrefixStore("phimoe", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=patience_seconds),
        )
        atexit.register(leave_processes)  # NCCL complains of a process that leaves without a word
    require_device(place, asked=device)
    return Processes(launch.rank, launch.world_size, torch.device(place.device))


def _meet(launch: Launch) -> Store:
    """Meet the other ranks at MASTER_ADDR and MASTER_PORT, which rank 0 (or torchrun) opens."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=_MEETING_SECONDS)))[0]
    except dist.DistNetworkError as error:
        if launch.rank == 0 and "EADDRINUSE" in str(error):
            raise LaunchError(
                f"MASTER_PORT: {place} is in use by another program on this machine. Start the "
                "ranks with another MASTER_PORT."
            ) from error
        raise LaunchError(
            f"MASTER_ADDR: rank {launch.rank} could not meet rank 0 at {place} "
            f"({str(error).splitlines()[0]}). Look whether rank 0 runs, and whether its machine "
            "can be reached at that address and port."
        ) from error


def leave_processes() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
