"""Seconds and peak memory of counting a trace of many tokens: run it, on a quiet machine.

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python tests/analysis/measure_speed.py FOLDER [TOKENS]

Writes a synthetic trace of Phi-3.5-MoE's shape (32 layers, 16 experts, top 2, 32,064 token ids) to
FOLDER unless it is there, then counts everything in a process of its own.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_trace import write_trace

from analysis.count_trace import count_trace
from moe.trace.batch import Layout, TraceBatch
from moe.trace.read import open_trace

LAYERS, EXPERTS, CHOICES, VOCAB, DOMAINS, DOCUMENT = 32, 16, 2, 32_064, 8, 500


def batches(num_tokens: int) -> Iterator[TraceBatch]:
    """Rows without structure: what they hold changes neither time nor memory much."""
    source = np.random.default_rng(0)
    size = 2**16
    for start in range(0, num_tokens, size):
        row_T = np.arange(start, min(start + size, num_tokens))
        first = source.integers(EXPERTS, size=(len(row_T), LAYERS, 1), dtype=np.int16)
        step = source.integers(1, EXPERTS, size=(len(row_T), LAYERS, 1), dtype=np.int16)
        expert_TLK = np.concatenate([first, (first + step) % EXPERTS], axis=2)
        yield TraceBatch(
            source.zipf(1.3, size=len(row_T)).clip(max=VOCAB).astype(np.int32) - 1,
            (row_T % DOCUMENT).astype(np.int32),
            row_T // DOCUMENT,
            (row_T // DOCUMENT % DOMAINS).astype(np.int16),
            expert_TLK,
            source.random((len(row_T), LAYERS, CHOICES), dtype=np.float32),
        )


def measure(folder: Path) -> None:
    """Count the trace in folder and print what it took."""
    trace = open_trace(folder)
    before = time.perf_counter(), time.process_time()
    counts = count_trace(trace, vocab_size=VOCAB)
    wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{counts.routing.num_tokens:,} tokens, {LAYERS} layers, top {CHOICES} of {EXPERTS}, "
        f"{trace.info.num_bytes / 2**30:.2f} GiB on disk: {wall:.1f} s, {cpu:.1f} s of one core, "
        f"peak {peak:.2f} GiB"
    )


def main() -> None:
    """Write the trace where there is none, and measure it."""
    folder = Path(sys.argv[1])
    num_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000_000
    if folder.exists():
        measure(folder)
        return
    layout = Layout(LAYERS, EXPERTS, CHOICES, has_logits=False, has_steps=False)
    domains = tuple(f"domain{number}" for number in range(DOMAINS))
    write_trace(folder, batches(num_tokens), layout=layout, domains=domains)
    print(f"wrote {num_tokens:,} tokens to {folder}; run it again to measure")


if __name__ == "__main__":
    main()
