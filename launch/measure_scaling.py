"""Measure on this machine what one rank sends and holds, for every layout, beside the plan.

usage: python launch/measure_scaling.py [--json FILE] [--worlds 1,2,4]

Real processes over gloo on loopback train a small Phi-3.5-MoE; all of ZeRO 0 to 3 with every size
of expert group. Bytes sent are those of the kernel's TCP counters, memory is that of all tensors
alive at the fullest moment of a step (launch/rank_meters.py), without DeepSpeed's gradient bucket,
which is 500 million elements for every model and never touched here beyond what is used. Every rank
has the same work whatever their number. Prints a table, and exits with 1 where a plan is more than
a tenth off.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels"), str(_ROOT / "launch")]

from measured_on import measured_on  # noqa: E402
from scaling_rank import MODELS, Case, layout_of_case  # noqa: E402

from moe.plan.held import num_held  # noqa: E402
from moe.plan.memory import bucket_bytes, rank_memory  # noqa: E402
from moe.plan.traffic import rank_traffic  # noqa: E402

RESULTS = _ROOT / "launch/results/scaling_cpu.json"
TOLERANCE = 0.10
_SECONDS = 400  # for the ranks of one number of processes
_WORKER = Path(__file__).with_name("scaling_rank.py")


def main() -> int:
    """Measure, print, write; the exit code says whether every plan is within the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--worlds", default="1,2,4", help="numbers of processes")
    arguments = parser.parse_args()
    # so that the ranks are ended with this process, whoever ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[dict[str, Any]] = []
    for world_size in (int(word) for word in arguments.worlds.split(",")):
        cases = _cases(world_size)
        print(f"{world_size} process(es), {len(cases)} layouts", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            run_cases(cases, world_size, output=Path(folder))
            rows += [row_of(case, world_size, output=Path(folder)) for case in cases]
        print("\n".join(table(rows[-len(cases) :])), flush=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(_provenance() | {"rows": rows}, indent=1) + "\n")
    worst = {key: max(abs(row[key]) for row in rows) for key in ("sent_error", "peak_error")}
    print(f"written: {arguments.json}")
    print(f"largest error of the plan: bytes {worst['sent_error']:.2%}, ", end="")
    print(f"memory {worst['peak_error']:.2%}; allowed {TOLERANCE:.0%}")
    return 0 if max(worst.values()) <= TOLERANCE else 1


def _cases(world_size: int) -> list[Case]:
    sizes = [size for size in (1, 2, 4) if size <= world_size]
    made = [Case(size, stage) for size in sizes for stage in (0, 1, 2, 3)]
    extra = [
        Case(zero_stage=stage, precision="bfloat16", bf16_parameters=True) for stage in (1, 2, 3)
    ]
    if world_size == 2:
        extra.append(Case(zero_stage=2, activation_checkpointing=True, micro_batch_size=4))
        made += extra
    return made


def run_cases(cases: list[Case], world_size: int, *, output: Path) -> None:
    """Start the ranks and wait for them; records lie in output. RuntimeError where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = list(Case.__dataclass_fields__)
    values = [{name: getattr(case, name) for name in names} for case in cases]
    command = [sys.executable, str(_WORKER), str(output), json.dumps(values)]
    ranks = []
    for rank in range(world_size):
        place = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        log = (output / f"rank{rank}.log").open("wb")
        with log:
            ranks.append(subprocess.Popen(command, env=place, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + _SECONDS
    try:
        for rank, process in enumerate(ranks):
            if process.wait(timeout=max(1.0, deadline - time.monotonic())):
                raise RuntimeError((output / f"rank{rank}.log").read_text()[-4000:])
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def records_of(case: Case, world_size: int, *, output: Path) -> list[dict[str, Any]]:
    """What the ranks wrote of a case."""
    return [
        json.loads((output / f"{case.name}.rank{rank}.json").read_text())
        for rank in range(world_size)
    ]


def row_of(case: Case, world_size: int, *, output: Path) -> dict[str, Any]:
    """A case measured and planned: the mean of the ranks' bytes, the largest rank's memory."""
    records = records_of(case, world_size, output=output)
    layout = layout_of_case(case, world_size)
    memory = rank_memory(layout)
    planned = sum(sent.total for sent in rank_traffic(layout).values())
    # on a CPU what is offloaded is in the same memory
    bucket = 0 if case.bucket_elements else bucket_bytes(layout)
    peak = memory.total + memory.host - bucket
    sent = sum(record["sent_bytes"] for record in records) / world_size
    measured_peak = max(record["peak_bytes"] for record in records)
    seconds = [max(record["seconds"][i] for record in records) for i in range(case.num_steps)]
    return {
        "world_size": world_size,
        **{name: getattr(case, name) for name in Case.__dataclass_fields__},
        "parameters_of_a_rank": num_held(layout),
        "sent_bytes": round(sent),
        "planned_sent_bytes": planned,
        "sent_error": planned / sent - 1 if sent else float(planned),
        "peak_bytes": measured_peak,
        "planned_peak_bytes": peak,
        "peak_error": peak / measured_peak - 1,
        "fullest_moment": memory.fullest,
        "bucket_bytes_left_out": bucket,
        "peak_rss_bytes": max(record["peak_rss_bytes"] for record in records),
        "step_seconds": sorted(seconds)[len(seconds) // 2] if seconds else None,
        "all_step_seconds": seconds,
        "tokens_per_step": layout.tokens_of_rank * world_size,
        "planned_traffic": {name: part.total for name, part in rank_traffic(layout).items()},
        "collectives_of_rank_0": records[0]["collectives"],
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a layout, in MB of 10^6 bytes."""
    heads = ("sent MB", "plan", "off", "peak MB", "plan", "off", "s a step")
    lines = [f"{'world EP ZeRO':<34}" + "".join(f"{head:>10}" for head in heads)]
    for row in rows:
        words = [str(row[key]) for key in ("world_size", "expert_parallel_size", "zero_stage")]
        extra = "bfloat16" if row["bf16_parameters"] else ""
        extra += " recomputed" if row["activation_checkpointing"] else ""
        lines.append(
            f"{'x'.join(words) + ' ' + extra:<34}"
            f"{row['sent_bytes'] / 1e6:>10.2f}{row['planned_sent_bytes'] / 1e6:>10.2f}"
            f"{row['sent_error']:>10.2%}"
            f"{row['peak_bytes'] / 1e6:>10.1f}{row['planned_peak_bytes'] / 1e6:>10.1f}"
            f"{row['peak_error']:>10.2%}{row['step_seconds'] or 0:>10.2f}"
        )
    return lines


def _provenance() -> dict[str, Any]:
    """Where and how this was measured."""
    return measured_on() | {
        "backend": "gloo, loopback; one thread a process",
        "model": str(MODELS["tiny"]),
        "memory_is": "bytes of all tensors alive, the largest of a step, of the largest rank; "
        "without memory inside operations and without the gradient bucket",
        "sent_is": "tcpi_bytes_sent less retransmitted, of all connections but the store's, "
        "mean of the ranks",
    }


if __name__ == "__main__":
    sys.exit(main())
