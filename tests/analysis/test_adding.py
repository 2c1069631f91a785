"""Parts add to the whole; parts counted differently do not add."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from analysis.adding import Counts, add_into, total


@dataclass(frozen=True, eq=False)
class Sheep(Counts):
    number_F: np.ndarray
    colour: str


@dataclass(frozen=True, eq=False)
class Goats(Counts):
    number_F: np.ndarray
    colour: str


def sheep(*numbers: int, colour: str = "white") -> Sheep:
    return Sheep(np.array(numbers), colour)


def test_arrays_add_and_the_parts_stay_as_they_were() -> None:
    one, two, three = sheep(1, 2), sheep(10, 20), sheep(100, 200)
    whole = total(iter([one, two, three]))
    assert whole.number_F.tolist() == [111, 222]
    assert whole.colour == "white"
    assert (one + two).number_F.tolist() == [11, 22]
    assert one.number_F.tolist() == [1, 2]
    assert two.number_F.tolist() == [10, 20]


def test_adding_into_changes_the_first_and_none_starts_with_the_part() -> None:
    one = sheep(1, 2)
    assert add_into(None, one) is one
    assert add_into(one, sheep(5, 5)) is one
    assert one.number_F.tolist() == [6, 7]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (sheep(1, colour="black"), "colour: counted with 'white' and with 'black'"),
        (sheep(1, 2), r"number_F: shapes \(1,\) and \(2,\)"),
        (Goats(np.array([1]), "white"), "Sheep and Goats"),
    ],
)
def test_what_was_counted_differently_does_not_add(other: Counts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sheep(1) + other


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="none to add"):
        total([])
