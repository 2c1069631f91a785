"""How far two computations of the same numbers are apart, and how far they may be.

Float32 keeps 24 bits: one rounding is at most 6e-8 of a number. A logit or a gradient is a chain of
some tens of sums of some tens of products, in another order on each side, and a sum's rounding is
relative to its largest term. So the largest difference is measured against the largest number of
the tensor: a small number next to it may be what remains of large ones. 1e-5 is 170 roundings;
measured are 2.5e-6 for logits, and for gradients 2.3e-6 in the median and 6.1e-6 at most of 225
random models (a key's bias: softmax ignores what all keys share, so its gradient is what rotation
leaves of a sum of zero). A mistake in a formula is 1e-3 or more.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor

FLOAT32_LIMIT = 1e-5


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number; the difference where all are 0."""
    assert got.shape == expected.shape
    largest = expected.detach().abs().max().item()
    difference = (got.detach() - expected.detach()).abs().max().item()
    return difference / largest if largest > 0 else difference


def assert_all_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, limit: float = FLOAT32_LIMIT
) -> None:
    """The same names, and every tensor within the limit; the message names all that are not."""
    assert set(got) == set(expected)
    distances = {name: distance(got[name], expected[name]) for name in got}
    far = {name: value for name, value in distances.items() if not value <= limit}
    if far:
        pytest.fail(f"further apart than {limit}: {far}")
