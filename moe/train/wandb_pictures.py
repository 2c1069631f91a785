"""What W&B shows of expert load now and then: a heat map, and histograms over fixed edges.

W&B draws a histogram over steps as a band of columns; the edges are fixed so that layers, steps
and runs compare.
"""

from __future__ import annotations

import numpy as np

_CELL_PIXELS = 12
_EDGES = np.linspace(0.0, 4.0, 33)  # times the ideal load; what is beyond counts in the last bin

CAPTION = (
    "rows are layers from the top, columns experts; white is the ideal load 1/E, blue twice that "
    "or more, orange less, black none"
)


def load_picture(ratio_LE: np.ndarray) -> np.ndarray:
    """A (12 L, 12 E, 3) uint8 picture of load over ideal: orange below 1, white at 1, blue above.

    The two hues are told apart by all common kinds of colour blindness; dead experts are black.
    """
    ends = {"less": (179, 88, 6), "more": (5, 48, 97)}
    white = np.full(3, 255.0)
    side = np.where((ratio_LE < 1)[..., None], np.array(ends["less"]), np.array(ends["more"]))
    strength = np.clip(np.abs(ratio_LE - 1), 0, 1)[..., None]
    colour = (1 - strength) * white + strength * side
    colour[ratio_LE == 0] = 0
    pixels = colour.round().astype(np.uint8)
    return pixels.repeat(_CELL_PIXELS, axis=0).repeat(_CELL_PIXELS, axis=1)


def load_histogram(ratio_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(counts, edges) of load over ideal, of one layer or of all: 32 bins from 0 to 4 and more."""
    counts, edges = np.histogram(np.clip(ratio_E, 0.0, _EDGES[-1]), bins=_EDGES)
    return counts, edges
