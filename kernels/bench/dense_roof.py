"""What torch.mm reaches at the shapes of the layer with one expert for all rows: the roof."""

from __future__ import annotations

from typing import NamedTuple

import torch
from measure import Spread, time_calls

_BUFFERS = 2  # in turns, so that a call does not find its operands where the last one left them


class DenseProduct(NamedTuple):
    """One of the layer's six products, dense."""

    name: str
    direction: str  # forward or backward
    flop: int
    time: Spread

    @property
    def tflops(self) -> float:
        return self.flop / self.time.median / 1e9


def measure_roof(
    *, num_rows: int, d: int, f: int, dtype: torch.dtype, device: str, seconds: float
) -> list[DenseProduct]:
    """Time the six products of num_rows rows, laid out as the layer has them."""
    n = num_rows
    # (rows, reduction, columns) and whether the right operand is stored transposed
    shapes = {
        "x W13^T": ("forward", (n, d), (2 * f, d), "nt"),
        "act W2^T": ("forward", (n, f), (d, f), "nt"),
        "dy W2": ("backward", (n, d), (d, f), "nn"),
        "dh W13": ("backward", (n, 2 * f), (2 * f, d), "nn"),
        "dh^T x": ("backward", (n, 2 * f), (n, d), "tn"),
        "dy^T act": ("backward", (n, d), (n, f), "tn"),
    }
    found = []
    for name, (direction, left, right, layout) in shapes.items():
        pairs = [
            tuple(torch.randn(shape, device=device).to(dtype) for shape in (left, right))
            for _ in range(_BUFFERS)
        ]
        views = [(a.T if layout == "tn" else a, b.T if layout == "nt" else b) for a, b in pairs]
        rows, reduction = views[0][0].shape
        columns = views[0][1].shape[1]
        outs = [torch.empty(rows, columns, device=device, dtype=dtype) for _ in range(_BUFFERS)]

        def prepare(index: int, views=views, outs=outs):
            a, b = views[index % _BUFFERS]
            return lambda: torch.mm(a, b, out=outs[index % _BUFFERS])

        time = time_calls(prepare, device=device, repeats=24, seconds=seconds)
        found.append(DenseProduct(name, direction, 2 * rows * reduction * columns, time))
        del pairs, views, outs, prepare
    return found


def best_tflops(products: list[DenseProduct]) -> float:
    """The fastest of the six: the strictest roof that these shapes give."""
    return max(product.tflops for product in products)
