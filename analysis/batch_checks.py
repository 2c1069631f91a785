"""Numbers of a batch that must be in range before they index a table of counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError


def check_range(name: str, number: NDArray[np.integer], *, below: int) -> None:
    """Refuse numbers outside 0 .. below - 1: they would be counted as something else.

    Raises DataError naming the column, the value and what is allowed.
    """
    if number.size == 0:
        return
    for extreme in (int(number.min()), int(number.max())):
        if not 0 <= extreme < below:
            raise DataError(
                f"{name}: the trace holds {extreme}; it must be 0 to {below - 1} for what is "
                f"counted. Is this the trace of another model or corpus?"
            )


def check_experts(expert_TLK: NDArray[np.integer], *, num_experts: int) -> None:
    """Refuse expert numbers out of range, and arrays that are not (T, L, K) with K <= E."""
    if expert_TLK.ndim != 3:
        raise ValueError(f"expert_TLK: got shape {expert_TLK.shape}; it must be (T, L, K).")
    if not 1 <= expert_TLK.shape[2] <= num_experts:
        raise ValueError(
            f"expert_TLK: got {expert_TLK.shape[2]} choices a token; "
            f"it must be 1 to {num_experts}, the number of experts."
        )
    check_range("expert", expert_TLK, below=num_experts)
