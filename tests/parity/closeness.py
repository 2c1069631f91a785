"""How far two computations of the same numbers are apart, and how far they may be.

Float32 keeps 24 bits: one rounding is at most 6e-8 of a number. A logit or a gradient is a chain of
some tens of sums of some tens of products, in another order on each side, and a sum's rounding is
relative to its largest term. So the largest difference is measured against the largest number of
the tensor: a small number next to it may be what remains of large ones. 1e-5 is 170 roundings;
measured are at most 4e-6 for logits and 6e-6 for gradients, and a mistake in a formula is 1e-3 or
more.

One gradient is all cancellation: softmax ignores what all keys of a query share, so a key bias
would have gradient 0 but for the rotation of keys. The terms of its sum are those of the key
weight's with an input of 1, so it is measured against the larger of the two gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor

FLOAT32_LIMIT = 1e-5


def distance(got: Tensor, expected: Tensor, *, beside: Tensor | None = None) -> float:
    """Largest difference over the largest number of expected, or of `beside` where that is larger;
    the difference itself where all are 0."""
    assert got.shape == expected.shape
    largest = max(t.detach().abs().max().item() for t in (expected, beside) if t is not None)
    difference = (got.detach() - expected.detach()).abs().max().item()
    return difference / largest if largest > 0 else difference


def assert_all_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, limit: float = FLOAT32_LIMIT
) -> None:
    """The same names, and every gradient within the limit; the message names all that are not."""
    assert set(got) == set(expected)
    distances = {
        name: distance(
            got[name], expected[name], beside=expected.get(name.replace("key.bias", "key.weight"))
        )
        for name in got
    }
    far = {name: value for name, value in distances.items() if not value <= limit}
    if far:
        pytest.fail(f"further apart than {limit}: {far}")
