"""What the device below a Triton kernel is: a GPU, the interpreter, or a compiler's target."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

# of the interpreter: more programs than one, fewer than tiles, so that programs loop
_INTERPRETED_PROGRAMS = 3

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def on_its_device(launch: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Make the first argument's GPU the current one: Triton launches on the current one."""

    @functools.wraps(launch)
    def launched(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        tensor = args[0]
        if not isinstance(tensor, Tensor) or not tensor.is_cuda:
            return launch(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return launch(*args, **kwargs)

    return launched


def runs_triton(tensor: Tensor) -> bool:
    """Whether the kernels here take this tensor: on a GPU, and no float64."""
    return tensor.is_cuda and tensor.dtype != torch.float64


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it does not start at the 16 bytes that descriptors need.

    A parameter that is a view into an engine's flat buffer may start anywhere.
    """
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def is_interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors (TRITON_INTERPRET=1)."""
    return triton.knobs.runtime.interpret  # type: ignore[attr-defined]


def num_multiprocessors(tensor: Tensor) -> int:
    """The grid of a persistent kernel: one program a multiprocessor."""
    if not tensor.is_cuda:
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def compute_capability() -> int:
    """90 for an H100 or H200, 100 for a B200; the interpreter counts as 90."""
    if is_interpreted():
        return 90
    # not torch's: a compiler's target for a GPU that is not here has no torch device
    return int(triton.runtime.driver.active.get_current_target().arch)  # type: ignore[union-attr]
