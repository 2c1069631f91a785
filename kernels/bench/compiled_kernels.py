"""What the compiler makes of every kernel in every shipped configuration, for GPUs not present.

    python kernels/bench/compiled_kernels.py            # prints the table, writes the results file
    python kernels/bench/compiled_kernels.py --check    # exit 1 where the kept table differs

The launch functions of phi_kernels run on meta tensors with a driver that has a target and no
device: they choose configurations and compile as on a GPU, and nothing is launched. From the
compiled code come tensor-core instructions, bulk (TMA) copies, registers, spilled bytes and shared
memory. Needs no GPU and no CUDA; Triton's wheel carries the assembler.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import torch
import triton
from phi_kernels import combine, plan, route, triton_experts
from phi_kernels.dispatch_plan import DispatchPlan
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

KEPT = Path(__file__).parent / "results" / "compiled_kernels.md"
CAPABILITIES = (80, 90, 100)
# dynamic shared memory of one block (CUDA programming guide, table of compute capabilities)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, order=True)
class Row:
    """One compiled kernel; the table's columns."""

    capability: int
    kernel: str
    dtype: str
    configuration: str
    warps: int
    stages: int
    tensor_core: int  # instructions of the kind in TENSOR_CORE
    bulk_copies: int
    async_copies: int
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes

    def problems(self) -> list[str]:
        """What must not be shipped: spills, too much shared memory, a product off the units."""
        is_product = "gemm" in self.kernel or self.kernel.startswith(_PRODUCTS)
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes spilled")
        if self.shared > SHARED_LIMIT[self.capability]:
            found.append(f"{self.shared} bytes of shared memory")
        if is_product and self.dtype != "fp32" and not self.tensor_core:
            found.append(f"no {TENSOR_CORE[self.capability]}")
        return found


_PRODUCTS = ("gate_up", "grouped_gemm", "swiglu_bwd", "weight_gradient")


class _CompileOnly:
    """A Triton driver with a target and no device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compile_only(capability: int) -> Iterator[list[tuple[JITFunction, Any]]]:
    """Inside, launching a kernel compiles it for the capability and appends it to the list."""
    compiled: list[tuple[JITFunction, Any]] = []
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **settings)
        compiled.append((self, kernel))
        return kernel

    triton.runtime.driver.set_active(_CompileOnly(capability))  # type: ignore[arg-type]
    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield compiled
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_experts(dtype: torch.dtype, *, t: int, d: int, f: int, e: int, k: int) -> None:
    """Every kernel of a layer of T tokens, forward and backward, all variants."""
    x, weight = meta(t, d, dtype=dtype), meta(t, k, dtype=torch.float32)
    gate_up, down = meta(e, 2 * f, d, dtype=dtype), meta(e, d, f, dtype=dtype)
    index = DispatchPlan(
        meta(t * k, dtype=torch.int64), meta(t, k, dtype=torch.int64), meta(e, dtype=torch.int32)
    )
    main = meta(e, 2 * f, d, dtype=torch.float32), meta(e, d, f, dtype=torch.float32)
    for keeps_hidden in (True, False):
        _, hidden = triton_experts.launch_forward(
            x, weight, index, gate_up, down, keeps_hidden=keeps_hidden
        )
        for into in (None, main):
            triton_experts.launch_backward(
                x, x, weight, index, gate_up, down, hidden, needs=(True, True, True), into=into
            )


def launch_index_kernels(*, t: int, e: int, k: int) -> None:
    """Plan and routers: their types are int64 and float32 whatever the model's."""
    logit = meta(t, e, dtype=torch.float32)
    for sample, heun in (
        (None, None),
        (meta(t, 2, e, dtype=torch.float32), meta(t, 2, dtype=torch.float32)),
    ):
        weight, expert, _ = route.launch_sparsemixer(logit, 0.01, sample, heun)
        route.launch_sparsemixer_backward(weight, logit, expert, 0.01)
    for renormalise in (False, True):
        weight, expert, _ = route.launch_top_k_softmax(logit, k, renormalise)
        route.launch_top_k_softmax_backward(weight, logit, expert, renormalise)
    made = plan.launch_make_plan(expert, e)
    plan.launch_make_tiles(made.offset_E, t * k, 128)


def launch_row_kernels(dtype: torch.dtype, *, t: int, d: int, k: int) -> None:
    """Gather and combine on their own, as expert parallelism uses them."""
    x, weight = meta(t, d, dtype=dtype), meta(t, k, dtype=torch.float32)
    slot_of_row, row_of_slot = meta(t * k, dtype=torch.int64), meta(t, k, dtype=torch.int64)
    rows = combine.launch_gather_rows(x, slot_of_row, k)
    combine.launch_gather_sum(rows, row_of_slot, weight)
    combine.launch_gather_sum(rows, row_of_slot, None)
    combine.launch_combine_backward(x, rows, weight, row_of_slot)


# Phi-3.5-MoE's layer at 16,384 tokens (many rows an expert) and at 1,024 (few), and widths that no
# block divides, whose loads are masked
EXPERT_SHAPES = (
    {"t": 16384, "d": 4096, "f": 6400, "e": 16, "k": 2},
    {"t": 1024, "d": 4096, "f": 6400, "e": 16, "k": 2},
    {"t": 16384, "d": 1000, "f": 1400, "e": 16, "k": 2},
)
INDEX_SHAPES = ({"t": 16384, "e": 16, "k": 2}, {"t": 16384, "e": 60, "k": 8})


def rows_of(job: tuple[int, torch.dtype | None]) -> list[Row]:
    """Compile everything of one capability and type (None: the index kernels)."""
    capability, dtype = job
    with compile_only(capability) as compiled:
        if dtype is None:
            for shape in INDEX_SHAPES:
                launch_index_kernels(**shape)
        else:
            for shape in EXPERT_SHAPES:
                launch_experts(dtype, **shape)
            launch_row_kernels(dtype, t=16384, d=4096, k=2)
    made = sorted({_row(function, kernel, capability) for function, kernel in compiled})
    return [_worst(list(same)) for _, same in itertools.groupby(made, key=_identity)]


def _identity(row: Row) -> tuple[object, ...]:
    return (row.capability, row.kernel, row.dtype, row.configuration, row.warps, row.stages)


def _worst(rows: list[Row]) -> Row:
    """One row for kernels that differ in how their arguments are aligned only."""
    fewest = ("tensor_core", "bulk_copies", "async_copies")
    most = ("registers", "spilled", "shared")
    values = {name: min(getattr(row, name) for row in rows) for name in fewest}
    values |= {name: max(getattr(row, name) for row in rows) for name in most}
    return replace(rows[0], **values)


def _row(function: JITFunction, kernel: Any, capability: int) -> Row:
    ptx, source = kernel.asm["ptx"], kernel.src
    constants = {
        function.arg_names[place[0]]: value
        for place, value in source.constants.items()
        if len(place) == 1
    }
    registers, spilled = _resources(kernel.asm["cubin"])
    return Row(
        capability,
        function.__name__.strip("_").removesuffix("_kernel"),
        _element_type(source.signature),
        " ".join(
            f"{name.lower()}={int(value) if isinstance(value, bool) else value}"
            for name, value in constants.items()
            if name.isupper() and name not in ("GROUP", "NUM_STAGES")
        ),
        kernel.metadata.num_warps,
        constants.get("NUM_STAGES", 0),
        len(re.findall(rf"\b{re.escape(TENSOR_CORE[capability])}", ptx)),
        ptx.count("cp.async.bulk.tensor"),
        len(re.findall(r"\bcp\.async\.c[ag]\.", ptx)),
        registers,
        spilled,
        kernel.metadata.shared,
    )


def _element_type(signature: dict[str, Any]) -> str:
    """The first floating-point type of the arguments, or int."""
    found = re.search(r"bf16|fp16|fp32", " ".join(map(str, signature.values())))
    return found[0] if found else "int"


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (registers,) = re.findall(r"REG:(\d+)", text)
    return int(registers), sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", text)))


def table(rows: list[Row]) -> str:
    """Markdown: a head that says what made it, one table a capability."""
    return (
        "\n".join([*_head(), *(line for each in CAPABILITIES for line in _section(each, rows))])
        + "\n"
    )


def _head() -> list[str]:
    return [
        "# Compiled kernels",
        "",
        f"Made by `make kernels-report` with Triton {triton.__version__}; no GPU was involved. "
        "`tests/kernels/test_compiled_kernels.py` compiles all of it again and compares.",
        "",
        "Spilled: bytes of local memory a thread. Shared: bytes of a block. Tensor-core "
        "instructions, bulk (TMA) and asynchronous copies are counted in the PTX, where a loop's "
        "body stands once; of kernels that differ in the alignment of their arguments only, the "
        "worst is shown. float32 products are exact and use no tensor cores.",
    ]


def _section(capability: int, rows: list[Row]) -> list[str]:
    return [
        "",
        f"## sm_{capability}: {TENSOR_CORE[capability]}, "
        f"at most {SHARED_LIMIT[capability]:,} bytes of shared memory",
        "",
        "| kernel | type | configuration | warps | stages | tensor core | bulk | async "
        "| registers | spilled | shared |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row.kernel} | {row.dtype} | {row.configuration} | {row.warps} "
            f"| {row.stages or ''} | {row.tensor_core or ''} | {row.bulk_copies or ''} "
            f"| {row.async_copies or ''} | {row.registers} | {row.spilled} | {row.shared:,} |"
            for row in rows
            if row.capability == capability
        ),
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the kept table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--capability", type=int, choices=CAPABILITIES, help="with --check: of this one alone"
    )
    options = parser.parse_args(arguments)
    if options.capability and not options.check:
        parser.error("--capability: the table has every capability; allowed with --check only")
    chosen = (options.capability,) if options.capability else CAPABILITIES
    jobs = list(itertools.product(chosen, (None, *DTYPES)))
    rows: list[Row] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for number, made in enumerate(pool.map(rows_of, jobs), start=1):
            rows += made
            print(f"{number}/{len(jobs)}: {len(rows)} kernels", file=sys.stderr, flush=True)
    problems = [(row, row.problems()) for row in sorted(rows) if row.problems()]
    for row, found in problems:
        print(f"error: sm_{row.capability} {row.kernel} {row.dtype} {row.configuration}: "
              f"{', '.join(found)}", file=sys.stderr)  # fmt: skip
    if options.check:
        kept = KEPT.read_text(encoding="utf-8")
        if options.capability:  # the blank line at its end: no row more, either
            section = "\n".join(_section(options.capability, sorted(rows)))
            is_kept = f"{section}\n\n" in f"{kept}\n"
        else:
            is_kept = kept == table(sorted(rows))
        if not is_kept:
            print(f"error: {KEPT.name} is not what the compiler makes today; run: make "
                  "kernels-report", file=sys.stderr)  # fmt: skip
            return 1
    else:
        text = table(sorted(rows))
        KEPT.write_text(text, encoding="utf-8")
        print(text, end="")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
