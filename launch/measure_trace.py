"""Measure on this machine what analysing a trace costs, and what recording one costs the model.

usage: python launch/measure_trace.py [--tokens 10000000] [--rounds 8] [--passes 32]
           [--folder DIR] [--json FILE]

Writes three traces of random tokens: of Phi-3.5-MoE's shape (32 layers, 16 experts, top 2), of
tiny_moe's (4 layers) with router logits, and one recorded in training (4 layers, 20 steps). Each is
then analysed by every metric that the notebooks show, in a process of its own with one thread
(launch/analysis_stages.py); the page's index has a measurement of its own,
launch/measure_explore.py. Then tiny_moe's forward pass with and without recording, in turn. Prints
tables, writes the numbers, and exits with 1 where a trace took more than 60 s or 2 GB (10^9 bytes
each), or recording more than 3 % of the pass. Run it on a quiet machine; the traces take about
7 GB of disk meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels"), str(_ROOT / "launch")]

from measured_on import measured_on  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from random_trace import VOCAB, Shape, write_random_trace  # noqa: E402
from trace_overhead import BATCH_SIZE, PASSES, SEQ_LEN, measure_overhead  # noqa: E402

from moe.config_from_dict import from_dict  # noqa: E402
from moe.model.transformer import build_model  # noqa: E402
from moe.model_config import ModelConfig  # noqa: E402
from moe.trace.batch import Layout  # noqa: E402

RESULTS = _ROOT / "launch/results/trace_cpu.json"
MOST_SECONDS, MOST_BYTES, MOST_OVERHEAD = 60.0, 2e9, 0.03
_STAGES = Path(__file__).with_name("analysis_stages.py")


def main() -> int:
    """Measure, print, write; the exit code says whether everything is within the limits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of each trace")
    parser.add_argument(
        "--rounds", type=int, default=8, help="of passes with and without recording"
    )
    parser.add_argument("--passes", type=int, default=PASSES, help="of a round")
    parser.add_argument("--folder", help="for the traces; a temporary one if absent")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    arguments = parser.parse_args()
    for name, least in (("tokens", 1000), ("rounds", 1), ("passes", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: got {getattr(arguments, name)}; it must be at least {least}.")
    result = measured_on()
    result["traces"] = []
    for shape in shapes(arguments.tokens):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            result["traces"].append(analysed(Path(folder) / "trace", shape))
        print("\n".join(stage_table(result["traces"][-1])), flush=True)
    values: Any = OmegaConf.to_container(OmegaConf.load(_ROOT / "conf/model/tiny_moe.yaml"))
    model = build_model(from_dict(ModelConfig, values)).eval()
    result["recording"] = [
        measure_overhead(model, rounds=arguments.rounds, logits=logits, passes=arguments.passes)
        for logits in (False, True)
    ]
    print("\n".join(overhead_table(result["recording"])))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {arguments.json}")
    problems = beyond_limits(result)
    for problem in problems:
        print(f"beyond the limit: {problem}")
    return 1 if problems else 0


def shapes(num_tokens: int) -> list[Shape]:
    """The traces that are measured."""
    documents = {"has_steps": False, "num_experts": 16, "top_k": 2}
    return [
        Shape("phi35_moe", Layout(32, has_logits=False, **documents), num_tokens, 10),
        Shape("tiny_moe, logits", Layout(4, has_logits=True, **documents), num_tokens, 10),
        Shape("training, 20 steps", Layout(4, 16, 2, False, has_steps=True), num_tokens, 20),
    ]


def analysed(folder: Path, shape: Shape) -> dict[str, Any]:
    """Write a trace and analyse it in a process of its own. RuntimeError where that fails."""
    started = time.perf_counter()
    write_random_trace(folder, shape)
    write_seconds = time.perf_counter() - started
    done = subprocess.run(
        [sys.executable, str(_STAGES), str(folder), str(VOCAB)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{shape.name}: the analysis failed\n{done.stderr[-4000:]}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        "name": shape.name,
        **shape.layout._asdict(),
        "num_tokens": shape.num_tokens,
        "disk_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "write_seconds": write_seconds,
        "seconds": sum(stage["seconds"] for stage in found),
        "peak_bytes": max(stage["peak_bytes"] for stage in found),
        "stages": found,
    }


def stage_table(trace: dict[str, Any]) -> list[str]:
    """One line a stage; memory is the largest so far, in MB of 10^6 bytes."""
    lines = [
        f"{trace['name']}: {trace['num_tokens']:,} tokens, {trace['num_layers']} layers, top "
        f"{trace['top_k']} of {trace['num_experts']}, {trace['disk_bytes'] / 1e9:.2f} GB on disk, "
        f"written in {trace['write_seconds']:.0f} s",
        f"  {'':<44}{'s':>8}{'peak MB':>10}",
    ]
    lines += [
        f"  {stage['stage']:<44}{stage['seconds']:>8.2f}{stage['peak_bytes'] / 1e6:>10.0f}"
        for stage in [*trace["stages"], {**trace, "stage": "together"}]
    ]
    return lines


def overhead_table(measured: list[dict[str, Any]]) -> list[str]:
    """One line with logits, one without."""
    lines = [
        f"recording, tiny_moe, {BATCH_SIZE} x {SEQ_LEN} tokens a pass, to the disk: median "
        "(least to most of all rounds)"
    ]
    for row in measured:
        kind = "with logits" if row["logits"] else "without logits"
        spreads = ", ".join(
            f"{key} {row[key]['median']:+.2%} ({row[key]['least']:+.2%} to {row[key]['most']:+.2%})"
            for key in ("wall", "cpu")
        )
        lines.append(
            f"  {kind}: {spreads}; at most {row['upper_bound']:.2%} by the trace's own account; "
            f"{row['plain_microseconds_a_token']:.1f} us a token, {row['bytes_a_token']:.0f} bytes"
        )
    return lines


def beyond_limits(result: dict[str, Any]) -> list[str]:
    """What is too slow or too large, in words."""
    problems = []
    for trace in result["traces"]:
        if trace["seconds"] > MOST_SECONDS:
            problems.append(f"{trace['name']}: {trace['seconds']:.1f} s; allowed {MOST_SECONDS:g}")
        if trace["peak_bytes"] > MOST_BYTES:
            gigabytes = f"{trace['peak_bytes'] / 1e9:.2f} GB; allowed {MOST_BYTES / 1e9:g}"
            problems.append(f"{trace['name']}: {gigabytes}")
    for row in result["recording"]:
        median = row["wall"]["median"]
        if median > MOST_OVERHEAD:
            kind = "with logits" if row["logits"] else "without logits"
            problems.append(f"recording {kind}: {median:.2%}; allowed {MOST_OVERHEAD:.0%}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
