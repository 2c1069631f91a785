"""HTML of the page; every text that comes from a file is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from analysis.explore.maps import Side


def header(sides: Sequence[Side], *, notes: Sequence[str]) -> str:
    """What this is, a line for each fact."""
    parts = []
    for side in sides:
        rows = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in side.facts)
        parts.append(f"<section><h2>{escape(side.title)}</h2><dl>{rows}</dl></section>")
    said = "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)
    return f"<div class='explore-header'>{''.join(parts)}</div>{said}"
