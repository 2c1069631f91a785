"""Large tensors on a CPU whose memory comes from the system 2 MiB at a time instead of 4 KiB.

glibc maps every block above 32 MiB anew, and the system clears it at the first touch, page by page.
The weight gradients of 16 experts are such blocks in every step: 157 MB in bfloat16 at D 1,024 and
F 1,600 took 40 ms of a step's 143 (1,024 tokens, two cores). Most Linux systems give huge pages
only to those that ask ("madvise"); where glibc keeps freed memory instead, asking changes nothing.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return torch.empty(shape) on the CPU, in huge pages where the system gives them.

    For tensors that are written as a whole: of a page touched once all is in use.
    """
    tensor = torch.empty(shape, dtype=dtype)
    advise = _madvise()
    if advise is not None and tensor.nbytes >= 2 * _HUGE_PAGE:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, end - start, _ADVICE)  # a hint: a refusal leaves ordinary pages
    return tensor


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The C library's function; None where the system has no huge pages to ask for."""
    if _ADVICE is None:
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
