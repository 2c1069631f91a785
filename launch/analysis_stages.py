"""What analysing a trace costs, stage by stage: the process that launch/measure_trace.py starts.

python analysis_stages.py FOLDER VOCAB_SIZE; prints one JSON object a stage: its name, seconds, and
the process's largest memory so far. A process of its own, so that the memory is the analysis's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels"), str(_ROOT / "launch")]

from resident_memory import rss_bytes  # noqa: E402 the path comes first

from analysis.balance import balance, compare_balance, domain_lift, domain_share  # noqa: E402
from analysis.co_activation import (  # noqa: E402
    chance_pairs,
    co_activation,
    normalised_co_activation,
    partner_preference,
)
from analysis.count_trace import TraceCounts, count_steps, count_trace  # noqa: E402
from analysis.figure_trace import explained_shares  # noqa: E402
from analysis.layer_agreement import layer_agreement  # noqa: E402
from analysis.margins import (  # noqa: E402
    alone_fraction,
    mean_margin,
    mean_masked_fraction,
    quantile_of_margins,
)
from analysis.over_steps import count_blocks, domain_dependence, overlap_of  # noqa: E402
from analysis.overlap import (  # noqa: E402
    best_renumbering,
    chance_saturation,
    jaccard,
    overlap_interval,
    saturation,
)
from analysis.specialisation import focus, lift  # noqa: E402
from analysis.token_table import token_table  # noqa: E402
from moe.trace.read import Trace, open_trace  # noqa: E402

Stage = tuple[str, Callable[[], object]]
_THRESHOLD = 0.01  # of SparseMixer, as in Phi-3.5-MoE


def stages(trace: Trace, *, vocab_size: int) -> Iterator[Stage]:
    """Every metric of a trace that the notebooks show, named; the first ones make the counts.

    Comparing two checkpoints reads the trace twice, as if it were both: of up to 8 layers.
    """
    if trace.info.layout.has_steps:
        yield "count each step", lambda: count_steps(trace)
        yield "blocks of steps: what the domain says", lambda: _of_blocks(trace)
        return
    counted: list[TraceCounts] = []

    def count() -> None:
        counted.append(count_trace(trace, vocab_size=vocab_size, threshold=_THRESHOLD))

    yield "verify, read, count", count
    yield from _of_counts(counted[0])
    if trace.info.num_layers <= 8:
        yield "stability between two checkpoints", lambda: _of_two(trace)


def _of_counts(counts: TraceCounts) -> Iterator[Stage]:
    routing, pair_LEE = counts.routing, counts.pairs.pair_LEE
    yield "load, deviations, diversity, dead experts", lambda: balance(routing)
    yield "deviations of two compared", lambda: compare_balance(routing, routing, is_paired=True)
    yield "domains: lift and share", lambda: (domain_lift(routing), domain_share(routing))
    yield "what token id, position and domain explain", lambda: explained_shares(counts)
    yield "tokens of every expert", lambda: _tokens(counts)
    yield "position effects", lambda: (
        lift(counts.positions.choice_LXE), focus(counts.positions.choice_LXE),
    )  # fmt: skip
    yield "co-activation", lambda: (
        co_activation(pair_LEE, counts.pairs.choice_LE), normalised_co_activation(pair_LEE),
        chance_pairs(pair_LEE), partner_preference(pair_LEE),
    )  # fmt: skip
    yield "agreement between layers", lambda: layer_agreement(counts.layer_pairs.joint_LLEE)
    margins = counts.margins
    if margins is not None:
        yield "router margins", lambda: (
            mean_margin(margins), quantile_of_margins(margins.histogram_LKH, 0.5),
        )  # fmt: skip
        yield "masked fraction", lambda: (mean_masked_fraction(margins), alone_fraction(margins))


def _tokens(counts: TraceCounts) -> None:
    assert counts.tokens is not None
    for layer in range(counts.tokens.choice_LXE.shape[0]):
        token_table(counts.tokens, None, layer=layer)


def _of_blocks(trace: Trace) -> None:
    for counts in count_blocks(trace)[1]:
        domain_dependence(counts)


def _of_two(trace: Trace) -> None:
    counts = overlap_of(trace, trace)
    for metric in (saturation, jaccard):
        overlap_interval(counts, metric)
    chance_saturation(counts.joint_LEE, top_k=trace.info.top_k)
    best_renumbering(counts.joint_LEE)


def main() -> None:
    """Run every stage and print what it took."""
    started = time.perf_counter()
    trace = open_trace(sys.argv[1])
    for name, run in stages(trace, vocab_size=int(sys.argv[2])):
        run()
        now = time.perf_counter()
        stage = {"stage": name, "seconds": now - started, "peak_bytes": rss_bytes("VmHWM")}
        print(json.dumps(stage), flush=True)
        started = now


if __name__ == "__main__":
    main()
