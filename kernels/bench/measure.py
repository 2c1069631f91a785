"""How long a call takes and how much memory it holds, on a GPU or, for a dry run, on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """Milliseconds of one call."""

    median: float
    low: float  # quartiles
    high: float
    count: int


def spread(milliseconds: list[float]) -> Spread:
    """Median and quartiles; of fewer than two samples the sample itself."""
    if len(milliseconds) < 2:
        return Spread(*milliseconds * 3, count=len(milliseconds))
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Spread(median, low, high, len(milliseconds))


def time_calls(
    prepare: Callable[[int], Callable[[], object]],
    *,
    device: str,
    repeats: int,
    seconds: float,
) -> Spread:
    """Time what prepare(i) returns; what prepare itself does is outside the measured span.

    On a GPU everything is queued without waiting, each call between two events, so the host's
    launches overlap with the GPU's work as in training; it waits only every few calls, to see how
    much time is left. At least three samples there, then until `repeats` or `seconds`.
    """
    # a dry run is there to run every line, once
    warm_up, least, count = (2, 3, 4) if device == "cuda" else (0, 1, 1)
    for index in range(warm_up):
        prepare(index)()
    synchronise(device)
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < least or (len(found) < repeats and time.perf_counter() - begin < seconds):
        found += _batch(prepare, device=device, first=warm_up + len(found), count=count)
    return spread(found)


def _batch(
    prepare: Callable[[int], Callable[[], object]], *, device: str, first: int, count: int
) -> list[float]:
    if device != "cuda":
        found = []
        for index in range(first, first + count):
            call = prepare(index)
            begin = time.perf_counter()
            call()
            found.append((time.perf_counter() - begin) * 1e3)
        return found
    pairs = []
    for index in range(first, first + count):
        call = prepare(index)
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def synchronise(device: str) -> None:
    """Wait for the GPU where there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], object], *, device: str) -> int | None:
    """Most bytes held at once during the call above those held before; None without a GPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[], Tensor], *, weights: list[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass, weights apart."""
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(found.values())
