"""Whether all ranks are of one kind, told through the store before any process group is made.

A rank without a GPU would wait over gloo for ranks that wait over NCCL, for as long as a collective
may take and before any watch is there. So every rank says first where it runs; rank 0 hears them
all and answers, and all start, or all end with the rank named that differs.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from moe.errors import ConfigError
from moe.parallel.launcher import Launch

_KEY = "parallel.device"
_MOST_NAMED = 8
_LAST_SECONDS = 10.0  # in which all ranks read why they end


@dataclass(frozen=True)
class Place:
    """Where one rank runs, in its own words."""

    host: str
    device: str  # as torch names it; "" where there is none that was asked for
    gpu: str  # its identity, "" on a CPU
    torch: str
    error: str = ""


def own_place(launch: Launch, name: str) -> Place:
    """This rank's device for a name of DEVICE_NAMES; what is wrong with it is in error."""
    host, version = socket.gethostname(), str(torch.__version__)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return Place(host, "cpu", "", version)
    try:
        count = torch.cuda.device_count()
        if count == 0:
            raise RuntimeError("torch finds no GPU")
        # a scheduler that gives each task one GPU shows it no other
        index = 0 if count == 1 else launch.local_rank
        if index >= count:
            raise RuntimeError(f"it is number {index} on its host, and torch finds {count} GPUs")
        torch.cuda.set_device(index)
        torch.zeros(1, device="cuda")  # a driver may be broken although it counts its devices
        gpu = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        return Place(host, "", "", version, " ".join(str(error).split())[:200])
    return Place(host, f"cuda:{index}", gpu, version)


def fault_of(places: list[Place], *, asked: str) -> str:
    """What keeps these ranks from working together, or ""; names the ranks that differ."""
    without = [rank for rank, place in enumerate(places) if place.error]
    if without:
        return (
            f"{_KEY}: got {asked!r}, and {_named(without, places)} cannot use a GPU "
            f"({places[without[0]].error}). {_FIX}"
        )
    kinds = Counter(place.device.partition(":")[0] for place in places)
    if len(kinds) > 1:
        odd = [r for r, place in enumerate(places) if place.device == "cpu"]
        return (
            f"{_KEY}: got 'auto', and torch finds no GPU on {_named(odd, places)}; the "
            f"{kinds['cuda']} other ranks have one. {_FIX}"
        )
    versions = Counter(place.torch for place in places)
    if len(versions) > 1:
        usual = versions.most_common(1)[0][0]
        odd = [rank for rank, place in enumerate(places) if place.torch != usual]
        return (
            f"torch: {_named(odd, places)} has version {places[odd[0]].torch}, the others {usual}. "
            "Use one environment on all hosts."
        )
    gpus: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        if place.gpu:
            gpus.setdefault((place.host, place.gpu), []).append(rank)
    shared = next((ranks for ranks in gpus.values() if len(ranks) > 1), [])
    if shared:
        return (
            f"{_KEY}: {_named(shared, places)} have one GPU between them; allowed: one process a "
            "GPU. Lower launcher.processes_per_node, or ask for more GPUs."
        )
    return ""


def agree(store: Store, launch: Launch, place: Place, *, asked: str) -> None:
    """Tell the store where this rank runs and hear whether all may start.

    Raises ConfigError, the same on every rank, where one of them differs, cannot run or has
    not come.
    """
    store.set(_told(launch.rank), json.dumps(asdict(place)))
    if launch.rank == 0:
        try:
            places = [
                Place(**json.loads(store.get(_told(rank)))) for rank in range(launch.world_size)
            ]
            fault = fault_of(places, asked=asked)
        except dist.DistError as error:
            fault = _missing(store, launch, error)
        store.set(_ANSWER, fault)
    fault = store.get(_ANSWER).decode()
    if not fault:
        return
    store.set(_heard(launch.rank), "")
    if launch.rank == 0:  # the store may end with this process: the others must have read it
        with contextlib.suppress(dist.DistError):
            heard = [_heard(rank) for rank in range(launch.world_size)]
            store.wait(heard, timedelta(seconds=_LAST_SECONDS))
    raise ConfigError(fault)


def _missing(store: Store, launch: Launch, error: dist.DistError) -> str:
    late = [rank for rank in range(launch.world_size) if not store.check([_told(rank)])]
    who = ", ".join(str(rank) for rank in late[:_MOST_NAMED]) or "a rank"
    return f"launcher: rank {who} did not say where it runs ({str(error).splitlines()[0]})."


def require_device(place: Place, *, asked: str) -> None:
    """Raise ConfigError where a process alone cannot have the device that was asked for."""
    if place.error:
        raise ConfigError(
            f"{_KEY}: got {asked!r}, and this machine ({place.host}) cannot use a GPU "
            f"({place.error}). {_FIX}"
        )


_ANSWER = "phimoe/answer"
_FIX = (
    "`python launch/doctor.py` on that host says what it can do. Mend or leave out the host, ask "
    "the scheduler for GPUs (launcher.gpus_per_node), or set parallel.device=cpu for all."
)


def _told(rank: int) -> str:
    return f"phimoe/place/{rank}"


def _heard(rank: int) -> str:
    return f"phimoe/heard/{rank}"


def _named(ranks: list[int], places: list[Place]) -> str:
    names = [f"rank {rank} (host {places[rank].host})" for rank in ranks[:_MOST_NAMED]]
    more = len(ranks) - len(names)
    return " and ".join(names) + (f" and {more} more" if more else "")
