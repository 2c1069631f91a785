"""Elements of stored tensors are read into others, in pieces, and converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe.train import tensor_file
from moe.train.atomic_files import opened_without_links
from moe.train.tensor_file import byte_chunks, read_elements
from moe.train.tensor_header import ShardedTensor, Span, read_stored_tensors, spans_between


def read(path: Path, into: dict[str, torch.Tensor]) -> None:
    stored = read_stored_tensors(path)
    for name, tensor in into.items():
        read_elements(stored[name], 0, tensor, open_file=opened_without_links)


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
    read(tmp_path / "t.safetensors", into)
    for name, tensor in stored.items():
        assert torch.equal(into[name], tensor.to(dtype)), name


def test_a_parameter_keeps_its_memory_and_takes_no_gradient_from_a_copy(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "t.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(3))
    place = parameter.data_ptr()
    read(tmp_path / "t.safetensors", {"a": parameter})
    assert parameter.data_ptr() == place
    assert parameter.requires_grad
    assert parameter.tolist() == [1, 1, 1]


def test_a_tensor_in_several_places_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_BUFFER_BYTES", 8)
    values = torch.arange(10, dtype=torch.float32)
    raw = values.numpy().tobytes()
    (tmp_path / "a").write_bytes(b"xx" + raw[:16])
    (tmp_path / "b").write_bytes(raw[16:20] + b"yyyy" + raw[20:] + b"z")
    spans = (Span(tmp_path / "a", 2, 16), Span(tmp_path / "b", 0, 4), Span(tmp_path / "b", 8, 20))
    tensor = ShardedTensor("F32", (2, 5), spans)
    assert tensor.num_bytes == 40
    assert [s[1:] for s in spans_between(tensor, 12, 16)] == [(14, 4), (0, 4), (8, 8)]
    for start in range(10):
        for end in range(start, 11):
            for dtype in (torch.float32, torch.float64):
                into = torch.full((end - start,), -1, dtype=dtype)
                read_elements(tensor, start, into, open_file=opened_without_links)
                assert into.tolist() == values[start:end].tolist()
    chunks = byte_chunks(tensor, open_file=opened_without_links)
    assert b"".join(bytes(chunk) for chunk in chunks) == raw
    with pytest.raises(ValueError, match="it has 2 of 3 of them"):
        read_elements(tensor, 8, torch.empty(3), open_file=opened_without_links)
