"""Tensors of more than 2^31 elements: addresses are 64-bit numbers everywhere."""

from __future__ import annotations

import time

import pytest
import torch
from expert_cases import TOLERANCE
from float64_experts import errors
from layer_on_device import HALF, IS_DRY_RUN, NEEDS_DEVICE, Size, answers_of, make_problem

pytestmark = [*NEEDS_DEVICE, pytest.mark.usefixtures("gives_memory_back")]
PATIENCE = 60  # seconds: other tests of the same session may hold memory

# each has more than 2^31 elements in what its name says, and little work
BEYOND_32_BITS = {
    "hidden": Size(98_304, 64, 6400, 4),  # N * 2F = 2.5e9
    "rows": Size(98_304, 12_288, 64, 4),  # N * D = 2.4e9, T * D = 1.2e9
    "tokens": Size(262_144, 8_704, 64, 4, 1),  # T * D = N * D = 2.3e9
    "weights": Size(512, 4096, 6400, 48),  # E * 2F * D = 2.5e9
}
SMALLER = {
    "hidden": Size(64, 32, 64, 4),
    "rows": Size(64, 64, 32, 4),
    "tokens": Size(64, 64, 32, 4, 1),
    "weights": Size(24, 32, 32, 12),
}


@pytest.mark.parametrize("name", BEYOND_32_BITS)
def test_addresses_beyond_32_bits(name):
    size = (SMALLER if IS_DRY_RUN else BEYOND_32_BITS)[name]
    num_rows = size.t * size.k
    elements = {
        "hidden": num_rows * 2 * size.f,
        "rows": num_rows * size.d,
        "tokens": size.t * size.d,
        "weights": size.e * 2 * size.f * size.d,
    }[name]
    assert IS_DRY_RUN or elements > 2**31
    if not IS_DRY_RUN:
        _wait_for_memory(size)
    problem = make_problem(size, HALF)
    found = errors(problem, answers_of(problem), sums=torch.float32)
    assert [key for key, value in found.items() if not value <= TOLERANCE[HALF]] == []


def _wait_for_memory(size: Size) -> None:
    """Skip where the GPU is too small, or stays in use by others."""
    num_rows, weights = size.t * size.k, 3 * size.e * size.f * size.d
    # in 2 bytes: x, y and their gradients, weights and theirs, hidden, activation, rows and theirs
    needed = 2 * (4 * size.t * size.d + 2 * weights + num_rows * (6 * size.f + 2 * size.d))
    needed += 4 * 2 * size.t * size.d + 2**33  # the exact y and gradient of x; float64 pieces
    begin = time.monotonic()
    while (free := torch.cuda.mem_get_info()[0]) < needed:
        total = torch.cuda.get_device_properties(0).total_memory
        if total < needed or time.monotonic() - begin > PATIENCE:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} free")
        time.sleep(1)
