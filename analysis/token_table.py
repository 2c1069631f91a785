"""Which tokens every expert of a layer is chosen for, as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.key_counts import KeyCounts
from analysis.specialisation import top_keys

_SHOWN_LETTERS = 14


def token_table(
    tokens: KeyCounts | None,
    vocabulary: Sequence[str] | None,
    *,
    layer: int,
    num_keys: int = 6,
    min_count: int = 20,
) -> str:
    """A line for each expert: the token ids with the largest share of first choices, best first.

    Only ids seen at least min_count times. Written 'text' 85% for an id 85 % of whose tokens chose
    this expert first; texts are escaped as Python writes them. Without a vocabulary, ids.
    """
    if tokens is None:
        raise ValueError("tokens: none were counted; pass vocab_size= to count_trace.")
    num_layers, _, num_experts = tokens.choice_LXE.shape
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: got {layer}; it must be 0 to {num_layers - 1}.")
    num_enough = int((tokens.token_X >= min_count).sum())
    lines = [
        f"layer {layer}: share of an id's tokens that chose the expert first "
        f"({num_enough} ids seen {min_count} times or more)"
    ]
    for expert in range(num_experts):
        top = top_keys(
            tokens.choice_LXE[layer], tokens.token_X, expert=expert, num_keys=num_keys,
            min_count=min_count,
        )  # fmt: skip
        named = (
            f"{_name(int(key), vocabulary)} {share:.0%}"
            for key, share in zip(top.key_N, top.share_N, strict=True)
        )
        lines.append(f"expert {expert:>3}: " + ("  ".join(named) or "-"))
    return "\n".join(lines)


def _name(key: int, vocabulary: Sequence[str] | None) -> str:
    if vocabulary is None or key >= len(vocabulary):
        return f"#{key}"
    text = vocabulary[key]
    return repr(text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 1] + "…")
