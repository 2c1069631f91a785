"""Large tensors cost fewer page faults where the system gives huge pages on request."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from phi_kernels import huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SHAPE = (16, 2**20)  # 64 MiB of float32: 16,384 ordinary pages


def faults_of_writing(make) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    make().fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_large_tensor_is_there_in_huge_pages():
    if not SETTING.exists() or "[never]" in SETTING.read_text():
        pytest.skip("this system has no huge pages")
    usual = faults_of_writing(lambda: torch.empty(SHAPE))
    if usual < 8000:
        pytest.skip("torch asks for huge pages itself here, or glibc keeps what is freed")
    assert faults_of_writing(lambda: huge_pages.empty(*SHAPE, dtype=torch.float32)) < usual / 4


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2**21 + 3,), (7, 2**20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_the_tensor_is_an_ordinary_one(shape, dtype):
    tensor = huge_pages.empty(*shape, dtype=dtype)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (shape, dtype, "cpu")
    assert tensor.is_contiguous()
    assert torch.equal(tensor.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_a_system_without_huge_pages_gives_ordinary_ones(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert huge_pages.empty(*SHAPE, dtype=torch.float32).fill_(2.0).sum() == 2.0 * 2**24
