"""Every kernel in every shipped configuration compiles for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "compiled_kernels.py"
KEPT = ROOT / "kernels" / "bench" / "results" / "compiled_kernels.md"


def rows():
    """(capability, columns of a row) of the kept table."""
    capability, found = 0, []
    for line in KEPT.read_text(encoding="utf-8").splitlines():
        if head := re.match(r"## sm_(\d+)", line):
            capability = int(head[1])
        elif line.startswith("| ") and not line.startswith("| kernel"):
            found.append((capability, [cell.strip() for cell in line.strip("|").split("|")]))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "only", [["--capability", "90"], pytest.param([], marks=pytest.mark.long)], ids=["90", "all"]
)
def test_the_kept_table_is_what_the_compiler_makes_and_has_no_problems(only, tmp_path):
    """About 250 kernels: two minutes on two cores. A spill, too, is an exit code of 1."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check", *only],
        cwd=tmp_path, capture_output=True, text=True, timeout=1100, check=False,
        env=kept | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("capability", "limit"), [(80, 163 * 1024), (90, 227 * 1024), (100, 227 * 1024)]
)
def test_products_use_tensor_cores_nothing_spills_and_shared_memory_fits(capability, limit):
    table = [cells for number, cells in rows() if number == capability]
    products = {"gate_up_fwd", "grouped_gemm_fwd", "swiglu_bwd", "weight_gradient"}
    assert products <= {cells[0] for cells in table}
    for kernel, dtype, *_, tensor_core, bulk, _, registers, spilled, shared in table:
        assert int(spilled) == 0
        assert int(registers) <= 255
        assert int(shared.replace(",", "")) <= limit
        if kernel in products and dtype != "fp32":
            assert int(tensor_core) > 0
            # the weights come by the tensor memory unit where there is one
            if capability >= 90 and kernel != "weight_gradient":
                assert int(bulk) > 0


def test_every_kernel_of_the_package_is_in_the_table():
    defined = set()
    for file in (ROOT / "kernels" / "phi_kernels").glob("*.py"):
        defined |= set(re.findall(r"^def _(\w+)_kernel\(", file.read_text(), flags=re.MULTILINE))
    for capability in (80, 90, 100):
        assert {cells[0] for number, cells in rows() if number == capability} == defined
