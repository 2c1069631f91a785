"""The targets of the benchmark, each met, not met or not measured, from the rows of a result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

OURS = "phi_kernels"
TOKENS = 16_384
Row = dict[str, Any]


class Verdict(NamedTuple):
    """One target: its text, whether it is met (None: not measured), and the number."""

    target: str
    is_met: bool | None
    found: str

    def line(self) -> str:
        word = {True: "met", False: "NOT MET", None: "not measured"}[self.is_met]
        return f"{word:<13} {self.target}: {self.found}"


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Judge what was measured; a row that is missing makes its target "not measured"."""
    measured = [row for row in rows if row["status"] == "measured"]
    found = [
        _fraction(measured, "forward", 0.70, "lead every published Triton system"),
        _fraction(measured, "backward", 0.65, "lead every published Triton system"),
        _fraction(measured, "forward", 0.80, "wanted next"),
        _fraction(measured, "backward", 0.75, "wanted next"),
    ]
    found += [_skew(measured, direction) for direction in ("forward", "backward")]
    found += [_saved(measured), _parts(measured)]
    found += [_linear(measured, direction) for direction in ("forward", "backward")]
    return found


def _find(
    rows: list[Row], direction: str, *, tokens: int = TOKENS, routing: str = "uniform",
    implementation: str = OURS,
) -> Row | None:  # fmt: skip
    wanted = (direction, tokens, routing, implementation)
    keys = ("pass", "tokens", "routing", "implementation")
    return next((row for row in rows if tuple(row[key] for key in keys) == wanted), None)


def _fraction(rows: list[Row], direction: str, least: float, why: str) -> Verdict:
    text = f"{direction} at least {least:.2f} of the dense roof at {TOKENS:,} tokens ({why})"
    row = _find(rows, direction)
    if row is None:
        return Verdict(text, None, "no row")
    fraction = row["fraction_of_roof"]
    return Verdict(text, fraction >= least, f"{fraction:.3f}, {row['tflops']:.0f} TFLOP/s")


def _skew(rows: list[Row], direction: str) -> Verdict:
    text = f"{direction} of skewed routing within 10 % of uniform at {TOKENS:,} tokens"
    even = _find(rows, direction)
    skewed = {
        routing: row
        for routing in ("zipf", "recorded", "all_to_one")
        if (row := _find(rows, direction, routing=routing)) is not None
    }
    if even is None or len(skewed) < 3:
        return Verdict(text, None, f"measured: {', '.join(skewed) or 'none'}")
    ratios = {routing: row["median_ms"] / even["median_ms"] for routing, row in skewed.items()}
    listed = ", ".join(f"{routing} {ratio:.3f}" for routing, ratio in ratios.items())
    return Verdict(text, max(ratios.values()) <= 1.10, f"time over uniform's: {listed}")


def _saved(rows: list[Row]) -> Verdict:
    text = f"saved activations at most 0.95 GiB at {TOKENS:,} tokens"
    row = _find(rows, "forward")
    if row is None:
        return Verdict(text, None, "no row")
    return Verdict(text, row["saved_gib"] <= 0.95, f"{row['saved_gib']:.3f} GiB")


def _parts(rows: list[Row]) -> Verdict:
    text = f"router, plan and combine at most 5 % of the layer at {TOKENS:,} tokens"
    shares = {}
    for direction in ("forward", "backward"):
        layer = _find(rows, direction)
        parts = [
            _find(rows, direction, implementation=f"part: {part}")
            for part in (
                ("router", "plan", "combine") if direction == "forward" else ("router", "combine")
            )
        ]
        if layer is None or any(part is None for part in parts):
            return Verdict(text, None, "no row")
        times = [part["median_ms"] for part in parts if part is not None]
        # the experts' time holds plan and combine already, not the router
        shares[direction] = sum(times) / (layer["median_ms"] + times[0])
    listed = ", ".join(f"{direction} {share:.3f}" for direction, share in shares.items())
    return Verdict(text, max(shares.values()) <= 0.05, listed)


def _linear(rows: list[Row], direction: str) -> Verdict:
    text = f"{direction} time linear in tokens from 4,096 to 65,536 within 10 %"
    found = [_find(rows, direction, tokens=tokens) for tokens in (4_096, TOKENS, 65_536)]
    times = [row["median_ms"] / row["tokens"] * 1e3 for row in found if row is not None]
    if len(times) < 3:
        return Verdict(text, None, f"{len(times)} of 3 rows")
    listed = ", ".join(f"{time:.3f}" for time in times)
    return Verdict(text, max(times) <= 1.10 * min(times), f"us a token: {listed}")
