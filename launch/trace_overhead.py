"""What recording costs a model's forward pass: rounds of passes with and without it, in turn.

Both are the pass of launch/trace.py (moe.trace.corpus.route); a recorded round hands every routing
to the writing thread and ends when all of it is a whole part on the disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe.model.transformer import Transformer
from moe.trace.batch import Layout
from moe.trace.corpus import route
from moe.trace.info import PartEntry
from moe.trace.write import PartLabel, Rows, TraceWriter

BATCH_SIZE, SEQ_LEN = 8, 256  # launch/trace.py's batch and tiny_moe's window
PASSES = 32  # of a round: 65,536 tokens, a row group


def measure_overhead(
    model: Transformer, *, rounds: int, logits: bool, passes: int = PASSES
) -> dict[str, Any]:
    """Seconds of a token without recording, and what recording adds, as parts of that.

    wall: by the clock, each recorded round against the plain one beside it; cpu: the same of the
    whole process's CPU time; upper_bound: the model's waiting and all of the thread's CPU time, as
    a trace says of itself.
    """
    config = model.config
    layout = Layout(config.num_layers, config.num_experts, config.top_k, logits, has_steps=False)
    generator = torch.Generator().manual_seed(0)
    # other tokens in every pass: the same ones again would cost nothing to compress
    size = (passes, BATCH_SIZE, SEQ_LEN)
    tokens_NBS = torch.randint(config.vocab_size, size, generator=generator)
    walls, cpus, plain_seconds, parts = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = TraceWriter(Path(folder), layout, num_domains=1, on_part=parts.append)
        with writer:
            for number in range(-1, rounds):  # the first warms up and is not counted
                # each goes first in every other round
                order = (False, True) if number % 2 else (True, False)
                label = PartLabel(f"part-{number + 1:05d}.parquet")
                took = {
                    is_on: _round(model, tokens_NBS, writer if is_on else None, label)
                    for is_on in order
                }
                if number >= 0:
                    (plain, plain_cpu), (recorded, recorded_cpu) = took[False], took[True]
                    walls.append(recorded / plain - 1)
                    cpus.append(recorded_cpu / plain_cpu - 1)
                    plain_seconds.append(plain)
    return {
        "logits": logits,
        "rounds": rounds,
        "tokens_a_round": tokens_NBS.numel(),
        "plain_microseconds_a_token": 1e6 * statistics.median(plain_seconds) / tokens_NBS.numel(),
        "bytes_a_token": parts[-1].num_bytes / tokens_NBS.numel(),
        "wall": _spread(walls),
        "cpu": _spread(cpus),
        "upper_bound": _upper_bound(parts[1:]),
    }


def _round(
    model: Transformer,
    tokens_NBS: torch.Tensor,
    writer: TraceWriter | None,
    label: PartLabel,
) -> tuple[float, float]:
    """Wall and CPU seconds of the passes of a round."""
    place_T = np.arange(tokens_NBS[0].numel())
    valid_T = np.ones(len(place_T), dtype=bool)
    wall, cpu = time.perf_counter(), time.process_time()
    for number, tokens_BS in enumerate(tokens_NBS):
        routings, seconds = route(
                model, tokens_BS, position_BS=torch.arange(tokens_BS.shape[1])[None],
                precision=torch.float32,
            )  # fmt: skip
        if writer is not None:
            rows = Rows(
                token_T=tokens_BS.flatten().numpy(),
                position_T=place_T % SEQ_LEN,
                document_T=place_T // SEQ_LEN + number * BATCH_SIZE,
                domain_T=np.zeros_like(place_T),
                valid_T=valid_T,
            )
            writer.put(label, rows, routings, forward_seconds=seconds)
    if writer is not None:
        writer.flush()
    return time.perf_counter() - wall, time.process_time() - cpu


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "least": ordered[0], "most": ordered[-1]}


def _upper_bound(parts: list[PartEntry]) -> float:
    spent = sum(part.handover_seconds + part.writer_seconds for part in parts)
    return spent / sum(part.forward_seconds for part in parts)
