"""Two sides in numbers: evenness of each layer of both, and whether their choices agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.explore.maps import LOAD, Side, map_of, steps_of
from analysis.explore.pair import Agreement
from analysis.utilisation import coefficient_of_variation, dead_experts, diversity


@dataclass(frozen=True, eq=False)
class Evenness:
    """Of a side's load at a step or of all tokens; each (L,)."""

    title: str
    deviation_L: NDArray[np.float64]
    diversity_L: NDArray[np.float64]
    dead_L: NDArray[np.int64]


def evenness(side: Side, source: str, *, step: int | None) -> Evenness:
    """Numbers of analysis.utilisation, of what the map of load shows."""
    at = step if steps_of(side, source) else None
    ratio_LE = map_of(side, source, quantity=LOAD, step=at)
    return Evenness(
        side.title,
        coefficient_of_variation(ratio_LE),
        diversity(ratio_LE),
        dead_experts(ratio_LE).sum(axis=-1),
    )


def evenness_table(sides: Sequence[Evenness]) -> str:
    """HTML: a row for each layer, both sides next to each other for each number."""
    names = ("load deviation", "diversity", "dead experts")
    which = "AB" if len(sides) > 1 else " "
    head = "".join(f"<th scope='col'>{n} {which[s]}</th>" for n in names for s in range(len(sides)))
    layers = max(len(side.deviation_L) for side in sides)
    rows = []
    for layer in range(layers):
        cells = [_cell(v, layer, form) for name, form in
                 (("deviation_L", ".3f"), ("diversity_L", ".3f"), ("dead_L", "d"))
                 for v in (getattr(side, name) for side in sides)]  # fmt: skip
        rows.append(f"<tr data-layer='{layer}'><th scope='row'>{layer}</th>{''.join(cells)}</tr>")
    return _table("evenness", f"<tr><th scope='col'>layer</th>{head}</tr>", rows)


def agreement_table(found: Agreement) -> str:
    """HTML: a row for each layer."""
    heads = ("layer", "same numbers", "95 % interval", "chance", "best renumbering")
    head = "".join(f"<th scope='col'>{name}</th>" for name in heads)
    same = found.same_numbers
    rows = [
        f"<tr data-layer='{layer}'><th scope='row'>{layer}</th><td>{same.estimate[layer]:.1%}</td>"
        f"<td>{same.low[layer]:.1%} to {same.high[layer]:.1%}</td><td>{found.chance_L[layer]:.1%}"
        f"</td><td>{found.renumbered_L[layer]:.1%}</td></tr>"
        for layer in range(len(found.chance_L))
    ]
    return _table("agreement", f"<tr>{head}</tr>", rows)


def _cell(values_L: NDArray, layer: int, form: str) -> str:
    return f"<td>{values_L[layer]:{form}}</td>" if layer < len(values_L) else "<td></td>"


def _table(name: str, head: str, rows: list[str]) -> str:
    return (
        f"<div class='ex ex-scroll' data-table='{name}'><table><thead>{head}</thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
