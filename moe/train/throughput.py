"""How fast training is: FLOPs of a token, the measured peak of the device, MFU, memory, a clock."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe.model_config import ModelConfig
from moe.model_flops import forward_flops_per_token

# largest last: a slow device stops before it reaches a product that would take too long
_CPU_SIZES = (512, 1024, 2048)
_ACCELERATOR_SIZES = (2048, 4096, 8192)
_LEAST_REPEATS = 3


def model_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of one token of training, forward and backward.

    3 * those of a forward pass (moe/model_flops.py: every matrix product that this token passes
    through, top_k and not all experts, the pairs of query and key that attention shows, counted
    exactly for causal, windowed and block-sparse layers): the backward pass makes two products for
    each one, the gradients of inputs and of weights.

    Sources: PaLM, arXiv 2204.02311, appendix B (6 N + 12 L H Q T, without the causal half);
    FlashAttention-2, arXiv 2307.08691, section 4.1 (half under a causal mask). Recomputation for
    activation checkpointing does not count (that would be hardware utilisation), nor does packing,
    where documents shorter than S see fewer keys, so with short documents MFU is a little too high.
    """
    return 3.0 * sum(forward_flops_per_token(config, seq_len).values())


def measure_peak_flops(
    device: torch.device | str, dtype: torch.dtype, *, seconds: float = 1.0
) -> float:
    """Return the best FLOP/s that square matrix products reach on this device, in about seconds.

    It is the denominator of MFU: measured, so that it exists for any CPU and counts its cores,
    its AMX units and its throttling. Several sizes, best of at least 3 repeats each.
    """
    device = torch.device(device)
    sizes = _CPU_SIZES if device.type == "cpu" else _ACCELERATOR_SIZES
    deadline = time.perf_counter() + seconds
    best, budget = 0.0, seconds / len(sizes)
    # its own: how many numbers are drawn depends on the time, and a resumed run would then end
    # with another state of the global generator than one that was never killed
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for size in sizes:
            if best and _LEAST_REPEATS * 2 * size**3 / best > deadline - time.perf_counter():
                break
            left = torch.rand(size, size, device=device, generator=generator).to(dtype)
            right = torch.rand(size, size, device=device, generator=generator).to(dtype)
            out = torch.empty(size, size, device=device, dtype=dtype)
            _seconds_of_product(left, right, out)  # warm-up: packing, kernel selection
            stop, repeats = time.perf_counter() + budget, 0
            while repeats < _LEAST_REPEATS or time.perf_counter() < stop:
                best = max(best, 2 * size**3 / _seconds_of_product(left, right, out))
                repeats += 1
    return best


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation, a fraction: useful FLOP/s over the peak of all devices together."""
    return tokens_per_second * flops_per_token / peak


def memory_in_use_gib() -> float:
    """Memory of this process in GiB.

    On a GPU in use: the most that PyTorch has had allocated on it. Otherwise: resident memory now.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 2**20
    # without /proc (macOS) the largest so far is what the system tells, there in bytes
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**30 if sys.platform == "darwin" else 2**20)


@dataclass(frozen=True)
class Speed:
    """What a Clock saw since it was last read; both 0.0 when no step was counted."""

    tokens_per_second: float
    step_seconds: float  # mean over the steps, pauses left out


@dataclass
class Clock:
    """Time spent on training steps, without the evaluation and the saving in between.

    Call count after each step, read when a record is due, and put everything that is not a
    training step inside `with clock.paused():`. On a GPU the loss must have been read (or the
    device synchronised) before read, or launched work counts as done.
    """

    now: Callable[[], float] = time.perf_counter
    _started: float = field(init=False)
    _paused_seconds: float = field(init=False, default=0.0)
    _num_tokens: int = field(init=False, default=0)
    _num_steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._started = self.now()

    def count(self, num_tokens: int) -> None:
        """One optimiser step is done; num_tokens over all ranks."""
        self._num_tokens += num_tokens
        self._num_steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside; must not be nested."""
        began = self.now()
        try:
            yield
        finally:
            self._paused_seconds += self.now() - began

    def read(self) -> Speed:
        """Speed since the last read, or since the clock was made; starts a new measurement."""
        ended = self.now()
        elapsed = ended - self._started - self._paused_seconds
        if self._num_steps and elapsed > 0:
            speed = Speed(self._num_tokens / elapsed, elapsed / self._num_steps)
        else:
            speed = Speed(0.0, 0.0)
        self._started, self._paused_seconds = ended, 0.0
        self._num_tokens, self._num_steps = 0, 0
        return speed


def _seconds_of_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    _synchronise(left.device)
    began = time.perf_counter()
    torch.mm(left, right, out=out)
    _synchronise(left.device)
    return max(time.perf_counter() - began, 1e-9)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
