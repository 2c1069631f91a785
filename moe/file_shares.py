"""How files are divided among readers: the largest first, each to who has least to do."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def share_of_sizes(sizes: Sequence[int], part: int, *, num_parts: int) -> list[int]:
    """The numbers of the files that a part of num_parts reads; every file is in one part."""
    load = [(0, number) for number in range(num_parts)]
    share = []
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        done, chosen = heapq.heappop(load)
        heapq.heappush(load, (done + sizes[number], chosen))
        if chosen == part:
            share.append(number)
    return share
