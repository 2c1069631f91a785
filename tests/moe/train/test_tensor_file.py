"""Stored tensors are copied into others of their names, in pieces, and converted."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from moe.train import tensor_file
from moe.train.tensor_file import copy_stored_tensors


@pytest.mark.parametrize("buffer", [8, 16, 64, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_larger_than_the_buffer_are_copied_whole(tmp_path, monkeypatch, buffer, dtype):
    monkeypatch.setattr(tensor_file, "_BUFFER_BYTES", buffer)
    generator = torch.Generator().manual_seed(0)
    stored = {
        "a": torch.randn(5, 7, generator=generator), "b": torch.randn(9, generator=generator),
        "c": torch.randn(3, 2, 5, generator=generator).bfloat16(), "d": torch.tensor(2.5),
        "e": torch.empty(0, 3),
    }  # fmt: skip
    save_file(stored, tmp_path / "t.safetensors")
    into = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in stored.items()}
    copy_stored_tensors(tmp_path / "t.safetensors", into)
    for name, tensor in stored.items():
        assert torch.equal(into[name], tensor.to(dtype)), name


def test_a_parameter_keeps_its_memory_and_takes_no_gradient_from_a_copy(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "t.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(3))
    place = parameter.data_ptr()
    copy_stored_tensors(tmp_path / "t.safetensors", {"a": parameter})
    assert parameter.data_ptr() == place
    assert parameter.requires_grad
    assert parameter.tolist() == [1, 1, 1]
