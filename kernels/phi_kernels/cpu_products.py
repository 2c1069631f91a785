"""Matrix products on a CPU with the fastest of the libraries that torch has.

bfloat16 and float16 products are oneDNN's in torch already. float32 ones are MKL's, which on a
processor that is not Intel's takes twice as long as oneDNN: 1,024 rows times (1024, 3200) on two
cores of an EPYC with AVX-512, torch 2.13: 192 against 420 GFLOP/s; of 32 rows 24 against 13 ms for
16 experts. torch reaches oneDNN in float32 through `mkldnn::_linear_pointwise`, the operator that
its compiler uses for inference; it always returns a new tensor, so writing into a given one costs a
copy, which is still less: weight gradients of 16 rows 31 ms with MKL, 21 with oneDNN and the copy.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

_CPU_INFO = Path("/proc/cpuinfo")


def is_compiled_by_shape(dtype: torch.dtype) -> bool:
    """Whether a product is compiled anew (0.4 ms) for every shape that was not seen before."""
    return dtype in (torch.bfloat16, torch.float16) or is_onednn_faster(dtype)


def scratch(num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor | None:
    """Return memory for results of `product`, None where the library brings its own."""
    return None if is_onednn_faster(dtype) else torch.empty(num_rows, num_columns, dtype=dtype)


def product(a_MK: Tensor, b_KN: Tensor, scratch_MN: Tensor | None) -> Tensor:
    """Return a @ b, in scratch_MN unless that is None."""
    if scratch_MN is None:
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
    return torch.mm(a_MK, b_KN, out=scratch_MN)


def product_into(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """Write a @ b to out_MN, a contiguous slice of something larger."""
    if is_onednn_faster(a_MK.dtype):
        out_MN.copy_(product(a_MK, b_KN, None))
    else:
        torch.mm(a_MK, b_KN, out=out_MN)


@functools.cache
def is_onednn_faster(dtype: torch.dtype) -> bool:
    """A fact of the machine and of torch, not a measurement: every run takes the same library."""
    return (
        dtype == torch.float32
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _is_other_than_intel(_CPU_INFO)
    )


def _is_other_than_intel(cpu_info: Path) -> bool:
    """Whether Linux names a vendor other than Intel; False where no vendor is named."""
    try:
        lines = cpu_info.read_text().splitlines()
    except OSError:
        return False
    vendors = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(vendors) and vendors != {"GenuineIntel"}
