"""Products of either library are the product; which one is taken is a fact of the machine."""

from __future__ import annotations

import pytest
import torch
from phi_kernels import cpu_products

WIDTHS = [(1, 8, 16), (37, 24, 40), (64, 200, 136)]


@pytest.fixture(params=[False, True], ids=["mm", "oneDNN"])
def library(request, monkeypatch):
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu_products, "is_onednn_faster", lambda _dtype: request.param)


@pytest.mark.parametrize(("m", "k", "n"), WIDTHS)
@pytest.mark.parametrize("transposed", ["neither", "left", "right", "both"])
@pytest.mark.usefixtures("library")
def test_both_libraries_multiply_operands_of_any_order(m, k, n, transposed):
    a = torch.randn(k, m).t() if transposed in ("left", "both") else torch.randn(m, k)
    b = torch.randn(n, k).t() if transposed in ("right", "both") else torch.randn(k, n)
    exact = a.double() @ b.double()
    larger = torch.full((m + 2, n), float("nan"))
    made = cpu_products.product(a, b, cpu_products.scratch(m, n, torch.float32))
    cpu_products.product_into(larger[1:-1], a, b)
    assert torch.equal(larger[1:-1], made)
    assert torch.isnan(larger[[0, -1]]).all()
    assert (made.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\nmodel : 2\nvendor_id\t: AuthenticAMD\n", True),
        ("vendor_id\t: GenuineIntel\n", False),
        ("CPU implementer\t: 0x41\n", False),
    ],
    ids=["AMD", "Intel", "Arm names no vendor"],
)
def test_the_vendor_is_read_from_what_linux_says(tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_products._is_other_than_intel(tmp_path / "cpuinfo") is expected
    assert not cpu_products._is_other_than_intel(tmp_path / "absent")


def test_only_float32_leaves_torchs_own_product():
    cpu_products.is_onednn_faster.cache_clear()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not cpu_products.is_onednn_faster(dtype)
