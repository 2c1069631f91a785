"""Do two traces of the same tokens choose the same experts? Counted once, kept in a small file.

Two runs number their experts differently, so choices are compared as they are and under the
renumbering that fits best. The renumbering is fitted on one half of the documents and judged on the
other, both ways round: judged where it was fitted it would find agreement in noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.adding import add_into
from analysis.aligned import aligned
from analysis.bootstrap import Interval
from analysis.explore.index import OnProgress, index_name
from analysis.overlap import (
    OverlapCounts,
    best_renumbering,
    chance_saturation,
    count_overlap,
    overlap_interval,
    saturation,
)
from analysis.routing_counts import group_of_document
from moe.errors import DataError
from moe.trace.batch import TraceBatch
from moe.trace.read import Trace
from moe.train.atomic_files import replace_file

_COLUMNS = ("token", "position", "document", "domain", "expert")
_ROWS = 2**17
_HALVES = 2


@dataclass(frozen=True, eq=False)
class Agreement:
    """Of each layer, (L,): the part of a token's experts that both chose."""

    same_numbers: Interval
    chance_L: NDArray[np.float64]  # of independent routers with the same loads
    renumbered_L: NDArray[np.float64]
    new_number_LE: NDArray[np.int64]  # for each expert of the second, its number in the first


def agreement(halves: tuple[OverlapCounts, OverlapCounts]) -> Agreement:
    """From the counts of two halves of the documents."""
    both = halves[0] + halves[1]
    top_k = both.shared_CLH.shape[-1] - 1
    matched_L = np.zeros(both.joint_LEE.shape[0])
    for fitted, judged in (halves, halves[::-1]):
        renumbering_LE = best_renumbering(fitted.joint_LEE)
        pairs_LE = np.take_along_axis(judged.joint_LEE, renumbering_LE[:, None], axis=1)[:, 0]
        matched_L += pairs_LE.sum(axis=-1)
    return Agreement(
        overlap_interval(both, saturation),
        chance_saturation(both.joint_LEE, top_k=top_k),
        matched_L / (top_k * both.token_C.sum()),
        best_renumbering(both.joint_LEE),
    )


def pair_path(folder: Path, one: Trace, two: Trace) -> Path:
    """Where the counts of two traces are kept in a folder."""
    names = f"{index_name(one.info)} {index_name(two.info)}"
    return folder / f"explore-pair-{hashlib.sha256(names.encode()).hexdigest()[:16]}.safetensors"


def count_pair(
    one: Trace, two: Trace, *, on_progress: OnProgress
) -> tuple[OverlapCounts, OverlapCounts]:
    """Count traces for which moe.trace.read.require_same_tokens holds, by halves of the documents.

    Raises DataError where a token, document or position differs, or layers or experts do.
    """
    shapes = [(t.info.num_layers, t.info.num_experts, t.info.top_k) for t in (one, two)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"compare: {shapes[1][0]} layers of {shapes[1][1]} experts, {shapes[1][2]} a token, "
            f"against {shapes[0][0]} of {shapes[0][1]}, {shapes[0][2]} a token: choices of such "
            "models do not agree or disagree."
        )
    halves: list[OverlapCounts | None] = [None] * _HALVES
    done = 0
    sides = (trace.batches(_COLUMNS, max_rows=_ROWS) for trace in (one, two))
    for first, second in aligned(*sides):
        half_T = group_of_document(first.document_T, num_groups=_HALVES)
        for half in range(_HALVES):
            is_of_half_T = half_T == half
            if is_of_half_T.any():
                part = count_overlap(
                    _some(first, is_of_half_T), _some(second, is_of_half_T),
                    num_experts=one.info.num_experts, num_domains=len(one.info.domains),
                )  # fmt: skip
                halves[half] = add_into(halves[half], part)
        done += first.num_rows
        on_progress("pair", done, one.info.num_tokens)
    if halves[0] is None or halves[1] is None:
        raise DataError("compare: the traces hold too few documents to compare their choices.")
    return halves[0], halves[1]


def save_pair(path: Path, halves: tuple[OverlapCounts, OverlapCounts]) -> None:
    """Write the counts for open_pair."""
    from safetensors.numpy import save

    arrays = {
        f"{half}/{field.name}": np.ascontiguousarray(getattr(counts, field.name))
        for half, counts in enumerate(halves)
        for field in fields(counts)
        if field.name != "num_domains"
    }
    arrays["num_domains"] = np.array([halves[0].num_domains])
    replace_file(path, save(arrays))


def open_pair(path: Path) -> tuple[OverlapCounts, OverlapCounts]:
    """Read what save_pair wrote. Raises DataError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        number = int(arrays.pop("num_domains")[0])
        first, second = (OverlapCounts(**_half(arrays, half), num_domains=number) for half in "01")
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}). Remove it and start again.") from None
    return first, second


def _half(arrays: dict[str, NDArray], half: str) -> dict[str, NDArray]:
    return {n.removeprefix(f"{half}/"): a for n, a in arrays.items() if n.startswith(f"{half}/")}


def _some(batch: TraceBatch, is_wanted_T: NDArray[np.bool_]) -> TraceBatch:
    return TraceBatch(*(None if column is None else column[is_wanted_T] for column in batch))  # type: ignore[arg-type]
