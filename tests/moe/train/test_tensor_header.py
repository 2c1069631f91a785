"""Where tensors lie in a file: agreement with the safetensors library, and headers that lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe.train.tensor_header import parse_json_object, read_stored_tensors

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def write(path: Path, header: bytes | dict, *, data: int = 22, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(raw) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + raw + bytes(data))
    return path


def test_each_tensor_is_where_the_library_put_it(tmp_path):
    tensors = {
        "x": torch.randn(3, 5), "y": torch.randn(7).bfloat16(), "z": torch.arange(4),
        "empty": torch.empty(0, 3), "scalar": torch.tensor(1.5),
    }  # fmt: skip
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    raw = (tmp_path / "t.safetensors").read_bytes()
    found = read_stored_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = found[name]
        content = raw[stored.offset : stored.offset + stored.num_bytes]
        assert content == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert stored.shape == tuple(tensor.shape)


def test_the_good_header_of_these_tests_is_good(tmp_path):
    assert list(read_stored_tensors(write(tmp_path / "t", GOOD))) == ["a", "b"]


def changed(key: str, **values: object) -> dict:
    return {**GOOD, key: {**GOOD[key], **values}}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (changed("b", data_offsets=[12, 18]), 18, "overlaps"),
        (changed("b", data_offsets=[18, 24]), 24, "leaves a hole"),
        (changed("a", data_offsets=[16, 32]), 32, "hole"),
        (changed("b", data_offsets=[16, 23]), 23, "takes 6 bytes"),
        (changed("b", data_offsets=[22, 16]), 22, "takes 6 bytes"),
        (changed("b", data_offsets=[-6, 0]), 22, "data_offsets"),
        (changed("b", data_offsets=[16.0, 22.0]), 22, "data_offsets"),
        (changed("b", data_offsets=[16, 22, 23]), 22, "data_offsets"),
        (changed("b", data_offsets="ab"), 22, "data_offsets"),
        (changed("b", shape=[-3]), 22, "shape"),
        (changed("b", shape=[True]), 22, "shape"),
        (changed("b", shape=[2**70, 0]), 22, "shape"),
        (changed("b", shape=None), 22, "shape"),
        (changed("b", dtype="F7"), 22, "known: F64"),
        (changed("b", dtype=["F32"]), 22, "known: F64"),
        ({**GOOD, "c": 3}, 22, "dtype, shape and data_offsets"),
        ({**GOOD, "c": {"dtype": "F32"}}, 22, "dtype, shape and data_offsets"),
        (changed("b", extra=1), 22, "dtype, shape and data_offsets"),
        (GOOD, 21, "is truncated"),
        (GOOD, 23, "belong to no tensor"),
        (b'{"a": 1, "a": 2}', 22, "'a' is given twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 22, "'dtype' is given twice"),
        (b"[1]", 22, "JSON object"),
        (b"{", 22, "not valid JSON"),
        (b"\xff\xfe", 22, "UTF-8"),
        (b"[" * 100_000, 22, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", 22, "a"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, says):
    with pytest.raises(ValueError, match=says):
        read_stored_tensors(write(tmp_path / "t", header, data=data))


@pytest.mark.parametrize("length", [23 + 200, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_a_truncated_file(tmp_path, length):
    with pytest.raises(ValueError, match="truncated, or no safetensors"):
        read_stored_tensors(write(tmp_path / "t", GOOD, length=length))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_of_a_few_bytes_is_truncated(tmp_path, size):
    (tmp_path / "t").write_bytes(bytes(size))
    with pytest.raises(ValueError, match="truncated, or no safetensors"):
        read_stored_tensors(tmp_path / "t")


def test_a_link_is_refused(tmp_path):
    write(tmp_path / "t", GOOD)
    (tmp_path / "link").symlink_to(tmp_path / "t")
    with pytest.raises(ValueError, match="symbolic link"):
        read_stored_tensors(tmp_path / "link")


def test_json_is_parsed_with_its_values():
    assert parse_json_object(b'{"a": {"b": [1, 2.5, null]}}') == {"a": {"b": [1, 2.5, None]}}
