"""The table of tokens lists what an expert takes most, and shows any text harmlessly."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.key_counts import KeyCounts
from analysis.token_table import token_table

# ids 0 to 3 by experts 0 and 1: id 3 is too rare to be listed
TABLE = KeyCounts(
    choice_LXE=np.array([[[30, 10], [0, 20], [25, 0], [1, 0]]]),
    token_X=np.array([40, 20, 25, 1]),
    num_choices=1,
)


def test_ids_are_listed_best_first_with_their_share() -> None:
    head, one, two = token_table(TABLE, [" a", "b", "\n", "x"], layer=0).splitlines()
    assert "layer 0" in head
    assert "3 ids seen 20 times or more" in head
    assert one == r"expert   0: '\n' 100%  ' a' 75%"
    assert two == "expert   1: 'b' 100%  ' a' 25%"


def test_without_a_vocabulary_ids_are_named_by_number() -> None:
    assert token_table(TABLE, None, layer=0, num_keys=1).splitlines()[1] == "expert   0: #2 100%"


def test_text_of_a_terminal_or_of_great_length_is_shown_escaped_and_short() -> None:
    words = ["\x1b[31mred", "b", "w" * 500, "x"]
    text = token_table(TABLE, words, layer=0)
    assert "\x1b" not in text
    assert r"'\x1b[31mred'" in text
    assert "'wwwwwwwwwwwww…' 100%" in text
    assert max(map(len, text.splitlines())) < 100


def test_an_expert_that_no_frequent_id_chose_has_an_empty_line() -> None:
    assert token_table(TABLE, None, layer=0, min_count=30).splitlines()[1:] == [
        "expert   0: #0 75%",
        "expert   1: #0 25%",
    ]
    assert token_table(TABLE, None, layer=0, min_count=1000).splitlines()[1] == "expert   0: -"


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="layer: got 1; it must be 0 to 0"):
        token_table(TABLE, None, layer=1)
    with pytest.raises(ValueError, match="vocab_size"):
        token_table(None, None, layer=0)
