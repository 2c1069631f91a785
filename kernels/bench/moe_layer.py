"""Benchmark of the sparse layer of Phi-3.5-MoE on a GPU, in one go: tests, roof, layer, verdict.

usage: python kernels/bench/moe_layer.py [--tune] [--out DIR] [--seconds 170]

Runs tests/gpu first; what they found stands beside every number, and red ones make the exit status
3. Their output is in DIR/tests. DIR is $OUT where that is set. Then torch.mm at the layer's shapes
(the roof), our layer at every number of tokens and routing, its parts, and the other
implementations that are installed; compute-sanitizer last, its answer a line.
Rows are in the CSV as soon as they are measured. Needs torch, triton, numpy and pytest alone.
--device cpu --small is a dry run of the script itself, in Triton's interpreter, in seconds; its
times say nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]
if not torch.cuda.is_available():
    # before any kernel is defined: Triton then interprets them on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dense_roof import best_tflops, measure_roof  # noqa: E402 the path comes first
from green_tests import GPU_GROUPS, SANITIZER, run_tests  # noqa: E402
from measure import Spread  # noqa: E402
from moe_cells import (  # noqa: E402
    MOST_APART,
    Measured,
    Size,
    make_inputs,
    measure_cell,
    measure_parts,
)
from moe_implementations import NAMES, NotHere, make_experts  # noqa: E402
from moe_targets import TOKENS, verdicts  # noqa: E402
from provenance import sm_mhz  # noqa: E402
from result_rows import Results  # noqa: E402
from routings import NAMES as ROUTINGS  # noqa: E402
from routings import NotRecorded, fullest_share, make_routing  # noqa: E402
from tune_tiles import best, end_warming, start_warming, tune  # noqa: E402

RESULTS = Path(__file__).with_name("results")
RED = 3  # exit status: numbers were measured, of kernels whose tests are not green


_Made = TypeVar("_Made")


class Plan(NamedTuple):
    """What one run measures, and with how much patience."""

    device: str
    dtype: torch.dtype
    sizes: tuple[Size, ...]  # the first is the one that targets are about
    repeats: int
    seconds_a_time: float
    deadline: float  # of time.perf_counter()
    recorded: Path | None

    def is_over(self) -> bool:
        return time.perf_counter() > self.deadline


class Cell(NamedTuple):
    """One row pair to come."""

    size: Size
    routing: str
    implementation: str


def cells(plan: Plan) -> list[Cell]:
    """Ours everywhere, then the others where targets are, then the others elsewhere."""
    ours, others = NAMES[0], NAMES[1:]
    first, *rest = plan.sizes
    found = [Cell(size, routing, ours) for size in plan.sizes for routing in ROUTINGS]
    found += [Cell(first, "uniform", name) for name in others]
    found += [Cell(size, "uniform", name) for size in rest for name in others]
    return found + [
        Cell(first, routing, name)
        for routing in ROUTINGS
        if routing != "uniform"
        for name in others
    ]


def measure_all(plan: Plan, results: Results, *, roof: float) -> None:
    """Measure cell after cell; what fails, is missing or comes too late says so in its row."""
    answers: dict[tuple[Size, str], torch.Tensor] = {}
    for cell in cells(plan):
        size, routing = cell.size, cell.routing
        where: dict[str, Any] = {
            "tokens": size.t, "routing": routing, "implementation": cell.implementation
        }  # fmt: skip
        try:
            if plan.is_over():
                raise NotHere("out of time")
            expert_TK = _routing(plan, size, routing)
            experts = make_experts(cell.implementation, size=size, device=plan.device)
            inputs = make_inputs(size, dtype=plan.dtype, device=plan.device)
            measured, y_TD = measure_cell(
                experts, inputs, expert_TK, ours_TD=answers.get((size, routing)),
                device=plan.device, repeats=plan.repeats, seconds=plan.seconds_a_time,
            )  # fmt: skip
        except (NotHere, NotRecorded) as reason:
            _add_not_measured(results, where, str(reason))
        except Exception as error:  # another package's failure must not end ours
            first_line = (str(error).splitlines() or [""])[0][:120]
            _add_not_measured(results, where, f"{type(error).__name__}: {first_line}")
        else:
            if cell.implementation == NAMES[0]:
                answers[size, routing] = y_TD
            where["fullest_share"] = fullest_share(expert_TK)
            _add_measured(results, where, measured, size, roof=roof, device=plan.device)
        experts = inputs = y_TD = None  # what a cell held is free for the next
        if plan.device == "cuda":
            torch.cuda.empty_cache()


def _routing(plan: Plan, size: Size, routing: str) -> torch.Tensor:
    return make_routing(
        routing, num_tokens=size.t, num_experts=size.e, top_k=size.k, recorded=plan.recorded
    ).to(plan.device)


def _add_not_measured(results: Results, where: dict[str, Any], reason: str) -> None:
    for direction in ("forward", "backward"):
        results.add(**where, **{"pass": direction}, status=f"not measured: {reason}")
    say(f"{where['tokens']} {where['routing']} {where['implementation']}: {reason}")


def _add_measured(
    results: Results, where: dict[str, Any], measured: Measured, size: Size, *, roof: float,
    device: str,
) -> None:  # fmt: skip
    status = "measured"
    if not measured.distance <= MOST_APART:
        status = f"wrong: y is {measured.distance:.3g} of its norm away from ours"
    clock = sm_mhz(device)
    memory: dict[str, Any] = {"saved_gib": measured.saved / 2**30}
    if measured.peak is not None:
        memory["peak_gib"] = measured.peak / 2**30
    spoken = []
    for direction, spread in (("forward", measured.forward), ("backward", measured.backward)):
        tflops = size.flop(direction) / spread.median / 1e9
        results.add(
            **where, **{"pass": direction}, **_times(spread), tflops=tflops, roof_tflops=roof,
            fraction_of_roof=tflops / roof, **memory, distance=measured.distance, sm_mhz=clock,
            status=status,
        )  # fmt: skip
        spoken.append(f"{direction} {spread.median:.3f} ms, {tflops / roof:.2f} of roof")
    say(f"{where['tokens']} {where['routing']} {where['implementation']}: {'; '.join(spoken)}")


def _times(spread: Spread) -> dict[str, Any]:
    return {
        "median_ms": spread.median, "quartile_1_ms": spread.low, "quartile_3_ms": spread.high,
        "repeats": spread.count,
    }  # fmt: skip


def add_parts(plan: Plan, results: Results) -> None:
    """Router, plan and combine at the targets' size, each alone."""
    size = plan.sizes[0]
    found = measure_parts(
        size, _routing(plan, size, "uniform"), dtype=plan.dtype, device=plan.device,
        repeats=plan.repeats, seconds=plan.seconds_a_time,
    )  # fmt: skip
    for (part, direction), spread in found.items():
        results.add(
            tokens=size.t, routing="uniform", implementation=f"part: {part}",
            **{"pass": direction}, **_times(spread), status="measured",
        )  # fmt: skip
        say(f"{size.t} uniform part: {part} {direction} {spread.median:.3f} ms")


def add_roof(plan: Plan, results: Results) -> float:
    """Measure the roof, write its rows, and return it in TFLOP/s."""
    size = plan.sizes[0]
    products = measure_roof(
        num_rows=size.t * size.k, d=size.d, f=size.f, dtype=plan.dtype, device=plan.device,
        seconds=plan.seconds_a_time,
    )  # fmt: skip
    roof = best_tflops(products)
    for product in products:
        results.add(
            tokens=size.t, routing="one expert", implementation=f"torch.mm {product.name}",
            **{"pass": product.direction}, **_times(product.time), tflops=product.tflops,
            roof_tflops=roof, fraction_of_roof=product.tflops / roof, sm_mhz=sm_mhz(plan.device),
            status="measured",
        )  # fmt: skip
        say(f"roof {product.name}: {product.tflops:.1f} TFLOP/s")
    return roof


def say_drift(plan: Plan, roof: float) -> None:
    """Measure the roof again: a GPU that got warm or was slowed down shows in the ratio."""
    size = plan.sizes[0]
    again = best_tflops(
        measure_roof(
            num_rows=size.t * size.k, d=size.d, f=size.f, dtype=plan.dtype, device=plan.device,
            seconds=plan.seconds_a_time,
        )
    )  # fmt: skip
    say(f"roof at the end: {again:.1f} TFLOP/s, {again / roof:.3f} of the one that counts")


def add_tuning(plan: Plan, results: Results) -> None:
    """Time tile configurations for many and few rows, uniform; print the best of each product."""
    lines, many = [], plan.sizes[0]
    for size in (many, many._replace(t=max(8, many.t // 16))):  # 16,384 and 1,024 tokens
        inputs = make_inputs(size, dtype=plan.dtype, device=plan.device)
        expert_TK = _routing(plan, size, "uniform")
        found = []
        for one in tune(
            size, inputs, expert_TK, device=plan.device, repeats=min(plan.repeats, 8),
            seconds=plan.seconds_a_time / 2, most=99 if plan.device == "cuda" else 2,
        ):  # fmt: skip
            found.append(one)
            say(one.line())
            tile = "x".join(map(str, one.tile))
            results.add(
                tokens=size.t, routing="uniform", implementation=f"tile {one.product} {tile}",
                **{"pass": "tune"}, **(_times(one.time) if one.time else {}), tflops=one.tflops,
                status="measured" if one.time else f"not measured: {one.reason}",
            )  # fmt: skip
            if plan.is_over():
                say("tuning: out of time")
                break
        lines += [f"best at {size.t} tokens: {one.line()}" for one in best(found)]
    print("\n".join(lines), flush=True)


def say(text: str) -> None:
    """A line of progress, with the seconds since the start of the process's measurements."""
    print(f"[{time.perf_counter() - _BEGIN:6.1f} s] {text}", flush=True)


_BEGIN = time.perf_counter()


def read_options() -> argparse.Namespace:
    """The command line; an error where it asks for a GPU that is not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a dry run")
    parser.add_argument("--tune", action="store_true", help="time tile configurations as well")
    out = Path(os.environ.get("OUT") or RESULTS)  # a lent machine keeps only what lies in $OUT
    parser.add_argument("--out", type=Path, default=out, help="folder of the CSV, picture and logs")
    parser.add_argument("--recorded", type=Path, help=".npy or .npz of expert numbers (T, K)")
    parser.add_argument("--seconds", type=float, default=170.0, help="for measurements in all")
    parser.add_argument("--tune-seconds", type=float, default=80.0, help="for --tune")
    parser.add_argument("--tests", nargs="+", help="test files instead of tests/gpu")
    parser.add_argument("--test-seconds", type=float, default=220.0, help="limit of the tests")
    parser.add_argument("--sanitizer-seconds", type=float, default=100.0, help="at the end; or 0")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU; --device cpu --small is a dry run")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu: only with --small; the interpreter would take days")
    return options


def make_measurement_plan(options: argparse.Namespace) -> Plan:
    """Sizes of Phi-3.5-MoE on a GPU; tiny ones, float32, for a dry run."""
    if options.small:
        sizes = tuple(Size(t, 32, 32, 16, 2) for t in (24, 8, 32))
        dtype, repeats, seconds = torch.bfloat16, 1, 0.1
    else:
        sizes = tuple(Size(t, 4096, 6400, 16, 2) for t in (TOKENS, 4_096, 65_536))
        dtype, repeats, seconds = torch.bfloat16, 20, 1.2
    if options.device == "cpu":
        dtype = torch.float32
    deadline = time.perf_counter() + options.seconds
    return Plan(options.device, dtype, sizes, repeats, seconds, deadline, options.recorded)


def main() -> int:
    """Tests, roof, cells, parts, tuning, table, verdicts; the exit status."""
    options = read_options()
    groups = (tuple(options.tests),) if options.tests else GPU_GROUPS
    warming = start_warming() if options.tune and options.device == "cuda" else []
    say(f"tests first: {'; '.join(' '.join(group) for group in groups)}")
    outcome = run_tests(groups, limit=options.test_seconds, logs=options.out / "tests")
    for line in outcome.lines():
        say(line)
    end_warming(warming, limit=20.0)
    tests = "green" if outcome.is_green else f"red: {outcome.failed}"
    if outcome.passed + outcome.failed == 0:
        tests = "none ran"
    if not outcome.is_green:
        print(outcome.output[-3000:], file=sys.stderr)
        print(f"tests {tests}: the numbers below are of kernels that may be wrong", file=sys.stderr)
    if options.device == "cpu":
        torch.set_num_threads(1)
    plan = make_measurement_plan(options)
    first = plan.sizes[0]
    setting = {
        "dtype": str(plan.dtype).removeprefix("torch."), "d": first.d, "f": first.f,
        "num_experts": first.e, "top_k": first.k,
    }  # fmt: skip
    results = Results(options.out, device=plan.device, setting=setting, tests=tests)
    say(" ".join(f"{name}={value}" for name, value in results.about.items()))
    roof = attempt("roof", lambda: add_roof(plan, results)) or math.nan
    attempt("parts", lambda: add_parts(plan, results))
    attempt("layer", lambda: measure_all(plan, results, roof=roof))
    if options.tune:
        deadline = time.perf_counter() + options.tune_seconds
        attempt("tuning", lambda: add_tuning(plan._replace(deadline=deadline), results))
    print("\n".join(results.table()))
    attempt("drift", lambda: say_drift(plan, roof))
    picture = attempt("picture", results.picture)
    print(f"rows: {results.file}" + (f"\npicture: {picture}" if picture else ""))
    if options.small:
        print("a dry run: its times say nothing, so no target is judged")
    for verdict in verdicts([] if options.small else results.rows):
        print(verdict.line())
    if options.sanitizer_seconds and options.device == "cuda" and not options.tests:
        found = run_tests(
            SANITIZER, limit=options.sanitizer_seconds, logs=options.out / "sanitizer"
        )
        print("\n".join(["compute-sanitizer:", *found.lines()]))
    return 0 if outcome.is_green else RED


def attempt(what: str, measure: Callable[[], _Made]) -> _Made | None:
    """What it returns, or None: one part that fails must not cost the others their numbers."""
    try:
        return measure()
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:200]
        say(f"{what}: not measured: {type(error).__name__}: {first_line}")
        return None


if __name__ == "__main__":
    raise SystemExit(main())
