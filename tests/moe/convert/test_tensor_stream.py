"""Tensors put together from rows, in chunks of any size; NaN and infinity found anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from published_folders import write_file

from moe.convert import tensor_stream
from moe.convert.tensor_map import Piece, Rows
from moe.convert.tensor_stream import TensorReader, are_equal, check_values, tensor_bytes
from moe.errors import CheckpointError
from moe.train.tensor_header import read_stored_tensors


def reader_of(path: Path, tensors: dict[str, np.ndarray]) -> TensorReader:
    write_file(path, tensors)
    return TensorReader(read_stored_tensors(path))


def nothing(num_bytes: int) -> None:
    pass


@pytest.mark.parametrize("chunk", [12, 13, 24, 36, 60, 10_000])
@pytest.mark.parametrize("width", [3, None])
def test_rows_of_any_order_and_step_are_put_together(tmp_path, monkeypatch, chunk, width):
    monkeypatch.setattr(tensor_stream, "CHUNK_BYTES", chunk)
    tail = () if width is None else (width,)
    generator = np.random.default_rng(0)
    a = generator.standard_normal((11, *tail)).astype(np.float32)
    b = generator.standard_normal((7, *tail)).astype(np.float32)
    pieces = [
        Piece(Rows("b", 2), Rows("t", 0), 3),
        Piece(Rows("a", 1, 3), Rows("t", 3, 2), 4),  # a 1 4 7 10 in t 3 5 7 9
        Piece(Rows("b", 0, 2), Rows("t", 4, 2), 3),  # b 0 2 4 in t 4 6 8
        Piece(Rows("a", 0), Rows("t", 10), 2),
    ]
    expected = np.empty((12, *tail), np.float32)
    expected[0:3], expected[3:10:2], expected[4:9:2], expected[10:] = (
        b[2:5],
        a[1::3],
        b[0:5:2],
        a[:2],
    )
    with reader_of(tmp_path / "t", {"a": a, "b": b}) as reader:
        done: list[int] = []
        chunks = tensor_bytes(expected.shape, "F32", pieces, reader, on_bytes=done.append)
        assert b"".join(bytes(chunk) for chunk in chunks) == expected.tobytes()
    assert sum(done) == expected.nbytes


@pytest.mark.parametrize("place", [0, 5, 6, 7, 19])
@pytest.mark.parametrize(
    ("bits", "dtype", "word"),
    [
        (0x7F80, np.uint16, "infinite"), (0xFF80, np.uint16, "infinite"),
        (0x7FC0, np.uint16, "NaN"), (0xFF81, np.uint16, "NaN"),
        (np.inf, np.float32, "infinite"), (-np.inf, np.float32, "infinite"),
        (np.nan, np.float32, "NaN"), (np.inf, np.float16, "infinite"), (np.nan, np.float16, "NaN"),
    ],
)  # fmt: skip
def test_one_value_that_is_not_finite_is_found_and_named(
    tmp_path, monkeypatch, place, bits, dtype, word
):
    monkeypatch.setattr(tensor_stream, "CHUNK_BYTES", 24)
    values = np.ones((4, 5), dtype)
    values.reshape(-1)[place] = bits
    with reader_of(tmp_path / "t", {"x": values}) as reader:
        index = rf"\[{place // 5}, {place % 5}\]"
        with pytest.raises(CheckpointError, match=rf"x{index} is {word}"):
            check_values(reader, "x", on_bytes=nothing)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.uint16, [0x7F7F, 0xFF7F, 0x0000, 0x8000, 0x0001, 0x007F]),
        (np.float32, [3.4028235e38, -3.4028235e38, 1e-45, -0.0]),
        (np.float16, [65504, -65504, 6e-8, -0.0]),
    ],
)
def test_the_largest_and_the_smallest_values_are_finite(tmp_path, dtype, values):
    with reader_of(tmp_path / "t", {"x": np.array(values, dtype)}) as reader:
        check_values(reader, "x", on_bytes=nothing)


def test_equal_bytes_are_equal_and_a_last_bit_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_stream, "CHUNK_BYTES", 16)
    a = np.ones((5, 5), np.float32)
    b = a.copy()
    b[4, 4] = np.nextafter(np.float32(1), np.float32(2))
    tensors = {"a": a, "same": a, "b": b, "flat": a.reshape(-1), "half": a.astype(np.float16)}
    with reader_of(tmp_path / "t", tensors) as reader:
        assert are_equal(reader, "a", "same")
        assert not are_equal(reader, "a", "b")
        assert not are_equal(reader, "a", "flat")
        assert not are_equal(reader, "a", "half")


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "t"
    with reader_of(path, {"x": np.ones((4, 4), np.float32)}) as reader:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="changed it while it was read"):
            check_values(reader, "x", on_bytes=nothing)


def test_a_file_that_is_changed_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "t"
    with reader_of(path, {"x": np.ones((4, 4), np.float32)}) as reader:
        check_values(reader, "x", on_bytes=nothing)
        reader.require_unchanged()
        with open(path, "r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(np.float32(2).tobytes())
        with pytest.raises(CheckpointError, match="changed it while it was read"):
            reader.require_unchanged()
