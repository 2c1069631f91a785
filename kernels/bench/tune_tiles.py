"""Time the tile configurations near the shipped ones for each grouped product of the layer.

Run by moe_layer.py --tune. It changes nothing: it prints what phi_kernels/tuning.py could hold.
As a script, `tune_tiles.py PART PARTS` compiles its part of the configurations into Triton's cache:
compiling them one after the other would take longer than timing them.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

import phi_kernels  # noqa: E402 the path comes first
from measure import Spread, time_calls  # noqa: E402
from moe_cells import Inputs, Size, make_inputs  # noqa: E402
from phi_kernels.gate_up import launch_gate_up  # noqa: E402
from phi_kernels.grouped_gemm import launch_grouped_gemm  # noqa: E402
from phi_kernels.swiglu_backward import launch_swiglu_backward  # noqa: E402
from phi_kernels.triton_device import compute_capability  # noqa: E402
from phi_kernels.tuning import Tile, Tiles, choose_tiles, shipped_tiles  # noqa: E402
from phi_kernels.weight_gradient import launch_weight_gradient  # noqa: E402
from routings import make_routing  # noqa: E402

_WARMERS = 6
# what a compiled kernel depends on is the same as at the real size: whole tiles in D and F
_WARM_SIZE = Size(256, 512, 512, 16, 2)


class Tuned(NamedTuple):
    """One configuration of one product: its time, or why it has none."""

    product: str
    tile: Tile
    is_shipped: bool
    tflops: float  # 0 where it did not run
    time: Spread | None
    reason: str

    def line(self) -> str:
        mark = "shipped" if self.is_shipped else ""
        values = " ".join(f"{name}={value}" for name, value in self.tile._asdict().items())
        found = (
            f"{self.time.median:8.3f} ms {self.tflops:6.1f} TFLOP/s" if self.time else self.reason
        )
        return f"{self.product:<24} {values:<72} {found} {mark}"


def candidates(product: str, shipped: Tile) -> list[Tile]:
    """The shipped tile first, then one change at a time, each with its reason."""
    # two levels of loads share the stages of a weight gradient: one more changes nothing
    step = 2 if product.startswith("weight_gradient") else 1
    changed = [
        {"num_stages": shipped.num_stages - step},  # less shared memory, room for a second program
        {"num_stages": shipped.num_stages + step},  # deeper prefetch, where it fits
        {"group": 8},  # fewer rows share a weight tile: less of L2 for rows
        {"group": 32},
        {"columns": shipped.columns // 2},  # fewer accumulators, more tiles to balance
        {"columns": shipped.columns // 2, "num_warps": 4},
        # two programs a multiprocessor: one's epilogue behind the other's product
        {"columns": shipped.columns // 2, "num_warps": 4, "num_stages": 3, "programs": 2},
        {"reduction": 128, "num_stages": max(2, shipped.num_stages // 2)},  # fewer, longer steps
        {"reduction": 32, "num_stages": shipped.num_stages + 2 * step},
        {"rows": 64 if shipped.rows == 128 else 128},  # waste at experts' ends against reuse
    ]
    return list(dict.fromkeys([shipped, *(shipped._replace(**change) for change in changed)]))


def tune(
    size: Size, inputs: Inputs, expert_TK: Tensor, *, device: str, repeats: int, seconds: float,
    most: int,
) -> Iterator[Tuned]:  # fmt: skip
    """Yield every configuration of the five products that is tried, at most `most` of each."""
    num_rows = expert_TK.numel()
    shipped = choose_tiles(inputs.grad_TD.dtype, num_rows=num_rows, num_experts=size.e)
    calls = _calls(size, inputs, expert_TK, shipped)
    for product, flop in _flop(size).items():
        base = getattr(shipped, product.split(" ")[0])
        for tile in candidates(product, base)[:most]:
            try:
                time = time_calls(
                    lambda _, product=product, tile=tile: lambda: calls[product](tile),
                    device=device,
                    repeats=repeats,
                    seconds=seconds,
                )
            except Exception as error:  # whatever a compiler says of a tile that does not fit
                reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
                yield Tuned(product, tile, tile == base, 0.0, None, reason)
                continue
            yield Tuned(product, tile, tile == base, flop / time.median / 1e9, time, "")


def best(tuned: list[Tuned]) -> list[Tuned]:
    """The fastest configuration of each product."""
    fastest: dict[str, Tuned] = {}
    for one in tuned:
        if one.time and (one.product not in fastest or one.tflops > fastest[one.product].tflops):
            fastest[one.product] = one
    return list(fastest.values())


def _flop(size: Size) -> dict[str, int]:
    product = 2 * size.t * size.k * size.d * size.f
    return {
        "gate_up": 2 * product,
        "down": product,
        "swiglu_backward": product,
        "input_gradient": 2 * product,
        "weight_gradient of down": product,
        "weight_gradient of gate_up": 2 * product,
    }


def _calls(
    size: Size, inputs: Inputs, expert_TK: Tensor, shipped: Tiles
) -> dict[str, Callable[[Tile], object]]:
    x_TD, grad_TD = inputs.x_TD[0].detach(), inputs.grad_TD
    gate_up_EHD, down_EDF = inputs.gate_up_EHD.detach(), inputs.down_EDF.detach()
    weight_TK = inputs.weight_TK.detach()
    plan = phi_kernels.make_plan(expert_TK, num_experts=size.e)
    tables = {
        rows: phi_kernels.make_tiles(plan.offset_E, num_rows=expert_TK.numel(), tile_rows=rows)
        for rows in {64, 128, shipped.down.rows}
    }
    hidden_NH, act_NF = launch_gate_up(
        x_TD, plan, gate_up_EHD, tiles=tables[shipped.gate_up.rows], tile=shipped.gate_up,
        needs_hidden=True, needs_act=True,
    )  # fmt: skip
    grad_hidden_NH = torch.randn_like(hidden_NH)
    return {
        "gate_up": lambda tile: launch_gate_up(
            x_TD, plan, gate_up_EHD, tiles=tables[tile.rows], tile=tile, needs_hidden=True,
            needs_act=True,
        ),
        "down": lambda tile: launch_grouped_gemm(
            act_NF, down_EDF, plan.offset_E, is_transposed=True, tiles=tables[tile.rows], tile=tile
        ),
        "swiglu_backward": lambda tile: launch_swiglu_backward(
            grad_TD, weight_TK, plan, hidden_NH, down_EDF, tiles=tables[tile.rows], tile=tile
        ),
        "input_gradient": lambda tile: launch_grouped_gemm(
            grad_hidden_NH, gate_up_EHD, plan.offset_E, is_transposed=False,
            tiles=tables[tile.rows], tile=tile,
        ),
        "weight_gradient of down": lambda tile: launch_weight_gradient(
            grad_TD, act_NF, plan, left_is_tokens=True, right_is_tokens=False, tile=tile
        ),
        "weight_gradient of gate_up": lambda tile: launch_weight_gradient(
            grad_hidden_NH, x_TD, plan, left_is_tokens=False, right_is_tokens=True, tile=tile
        ),
    }  # fmt: skip


def start_warming() -> list[subprocess.Popen[bytes]]:
    """Start processes that compile every configuration; what they print is of no interest."""
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(part), str(_WARMERS)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in range(_WARMERS)
    ]


def end_warming(processes: list[subprocess.Popen[bytes]], *, limit: float) -> None:
    """Give them `limit` seconds more, then end them: the GPU belongs to the measurements."""
    end = time.perf_counter() + limit
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.1, end - time.perf_counter()))
        if process.poll() is None:
            process.kill()
            process.wait()


def warm(part: int, parts: int) -> None:
    """Run each configuration of this part once at a small size; those that do not fit are left."""
    inputs = make_inputs(_WARM_SIZE, dtype=torch.bfloat16, device="cuda")
    expert_TK = make_routing(
        "uniform", num_tokens=_WARM_SIZE.t, num_experts=_WARM_SIZE.e, top_k=_WARM_SIZE.k
    ).to("cuda")
    for shipped in shipped_tiles(compute_capability(), torch.bfloat16):
        calls = _calls(_WARM_SIZE, inputs, expert_TK, shipped)
        everything = [
            (product, tile)
            for product in calls
            for tile in candidates(product, getattr(shipped, product.split(" ")[0]))
        ]
        for product, tile in everything[part::parts]:
            with contextlib.suppress(Exception):  # whatever a compiler says of it
                calls[product](tile)


if __name__ == "__main__":
    warm(int(sys.argv[1]), int(sys.argv[2]))
