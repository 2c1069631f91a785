"""What a tokenizer.json says, where it is a BPE with byte fallback: pieces, order, added tokens.

That is the form of the Phi-3 family's published files and of our own exports. The file is a list of
pairs that are joined, SentencePiece joins any two neighbours whose union is a piece; the two agree
where the list holds each piece's pair, in one order of the pieces, which is checked here. Whatever
would give a text other ids than the file does is refused by name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.data.added_tokens import AddedToken
from moe.data.sentencepiece_model import SPACE_MARK, is_byte_piece
from moe.errors import DataError

_FIRST = ("<unk>", "<s>", "</s>")
_Pair = tuple[str, str]


@dataclass(frozen=True)
class JsonVocabulary:
    """Pieces by id, spaces as U+2581; rank_of: when a piece of two is joined, 0 first."""

    pieces: tuple[str, ...]
    rank_of: dict[int, int]
    added: tuple[AddedToken, ...]  # all but <unk>, <s> and </s>
    adds_prefix_space: bool


def looks_like_json(content: bytes) -> bool:
    """Whether a tokenizer's file may be a tokenizer.json."""
    return content.lstrip()[:1] == b"{"


def read_tokenizer_json(content: bytes, *, where: Path, control: frozenset[str]) -> JsonVocabulary:
    """Read and check the file's content; control: names of tokens that no text contains.

    Raises DataError naming what in it has no counterpart here.
    """
    try:
        return _read(content, control)
    except _Unlike as error:
        raise DataError(
            f"{where}: {error}. What is read here is a BPE with byte fallback, as the Phi-3 "
            "family's tokenizer.json is and our exports' are; give the SentencePiece "
            "tokenizer.model that it was made from."
        ) from None


class _Unlike(Exception):
    """What is not as it must be."""


def _read(content: bytes, control: frozenset[str]) -> JsonVocabulary:
    try:
        whole = json.loads(content.decode())
        json.dumps(whole, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _Unlike("holds half of a surrogate pair, which is not text") from None
    except (ValueError, RecursionError) as error:
        raise _Unlike(f"is not JSON ({error})") from None
    model = whole.get("model") if isinstance(whole, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise _Unlike("has no model with a vocab")
    _require(model, {"type": ("BPE", None), "byte_fallback": (True,)}, "model.")
    _require(model, {"dropout": (None, 0, 0.0), "ignore_merges": (False, None)}, "model.")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        _require(model, {key: (None, "")}, "model.")
    adds_prefix_space, space = _spaces(whole)
    pieces = _pieces(model["vocab"])
    merges = list(_merges(model.get("merges")))
    added = tuple(_added(whole.get("added_tokens"), pieces, control, adds_prefix_space))
    no_text = {*_FIRST, *(token.content for token in added)}
    normal = {piece for piece in pieces if piece not in no_text and not is_byte_piece(piece)}
    order = _order(merges, normal)
    number_of = {piece: number for number, piece in enumerate(pieces)}
    if space != SPACE_MARK:
        marked = [piece for piece in normal if SPACE_MARK in piece]
        if marked:
            raise _Unlike(f"its piece {marked[0]!r} holds U+2581, which stands for no space there")
        pieces = [piece.replace(" ", SPACE_MARK) for piece in pieces]
    rank_of = {number_of[piece]: rank for rank, piece in enumerate(order)}
    return JsonVocabulary(tuple(pieces), rank_of, added, adds_prefix_space)


def _require(values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], name: str) -> None:
    for key, these in allowed.items():
        if values.get(key) not in these:
            raise _Unlike(f"its {name}{key} is {_short(values.get(key))}")


def _spaces(whole: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a space is put before a text, and how a space is written in the pieces."""
    normalizer, cutter = whole.get("normalizer"), whole.get("pre_tokenizer")
    steps = [normalizer] if normalizer is not None else []
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers")
    mark_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    if cutter is not None:
        # a Metaspace that puts a space before a text leaves it out where one is: not invertible
        scheme = cutter.get("prepend_scheme") if isinstance(cutter, dict) else None
        marks = {
            "type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": "never",
            "split": False,
        }  # fmt: skip
        if scheme != "never" or cutter != marks or steps:
            raise _Unlike(f"its pre_tokenizer is {_short(cutter)}")
        return False, SPACE_MARK
    if steps == []:
        return False, " "
    if steps == [{"type": "Prepend", "prepend": " "}]:
        return True, " "
    if steps in ([mark_spaces], [prepend, mark_spaces]):
        return steps[0] is not None and steps[0]["type"] == "Prepend", SPACE_MARK
    raise _Unlike(f"its normalizer is {_short(normalizer)}")


def _pieces(vocab: Mapping[str, Any]) -> list[str]:
    by_number = {number: piece for piece, number in vocab.items() if type(number) is int}
    if len(by_number) != len(vocab) or set(by_number) != set(range(len(vocab))):
        raise _Unlike("the ids of its model.vocab do not count up from 0 by one")
    pieces = [by_number[number] for number in range(len(vocab))]
    if tuple(pieces[:3]) != _FIRST:
        raise _Unlike(f"its first pieces are {_short(pieces[:3])}, not {', '.join(_FIRST)}")
    return pieces


def _merges(merges: Any) -> Iterator[_Pair]:
    if not isinstance(merges, list):
        raise _Unlike("has no model.merges")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_text, pair)):
            raise _Unlike(f"its merge {_short(merge)} is no pair of pieces")
        yield pair[0], pair[1]


def _order(merges: Sequence[_Pair], normal: set[str]) -> list[str]:
    """The pieces that are joined, the first first.

    Each must be listed with every pair that gives it, or with the one pair that joining by this
    order leaves of it: then joining any neighbours whose union is a piece is the same.
    """
    pairs_of: dict[str, set[_Pair]] = {}
    last = ""
    for left, right in merges:
        word = left + right
        for piece in (left, right, word):
            if piece not in normal:
                raise _Unlike(f"its merges name {piece!r}, which is no piece of text")
        if word != last and word in pairs_of:
            raise _Unlike(f"its merges into {word!r} do not follow each other")
        last = word
        pairs_of.setdefault(word, set()).add((left, right))
    rank_of = {word: rank for rank, word in enumerate(pairs_of)}
    for word in normal:
        if len(word) == 1:
            continue
        every = {(word[:cut], word[cut:]) for cut in range(1, len(word))}
        possible = {pair for pair in every if pair[0] in normal and pair[1] in normal}
        listed = pairs_of.get(word, set())
        if listed != possible and _last_pair(word, rank_of) not in listed:
            raise _Unlike(f"its merges lack pairs that give {word!r}")
        missing = sorted(set(word) - normal)
        if missing and listed:
            raise _Unlike(f"its piece {word!r} has {missing[0]!r}, which is no piece")
    return list(rank_of)


def _last_pair(word: str, rank_of: Mapping[str, int]) -> _Pair | None:
    """The two parts that are left of a piece when all pieces before it have been joined."""
    parts, limit = list(word), rank_of.get(word, 0)
    while len(parts) > 2:
        ranks = [rank_of.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(ranks)
        if best >= limit:
            return None
        place = ranks.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _added(
    entries: Any, pieces: Sequence[str], control: frozenset[str], adds_prefix_space: bool
) -> Iterator[AddedToken]:
    taken: dict[int, str] = {}
    for entry in entries if isinstance(entries, list) else ():
        values: dict[str, Any] = entry if isinstance(entry, dict) else {}
        number, content = values.get("id"), values.get("content")
        if not isinstance(number, int) or not isinstance(content, str) or number < 0 or not content:
            raise _Unlike(f"its added token {_short(entry)} has no id or no content")
        if number in taken or content in taken.values():
            raise _Unlike(f"its added token {content!r} ({number}) comes twice")
        taken[number] = content
        if number < len(pieces) and pieces[number] != content:
            raise _Unlike(f"its added token {content!r} has the id {number} of {pieces[number]!r}")
        if content in _FIRST and number < len(_FIRST):
            continue
        is_word = content not in control
        if is_word and values.get("single_word"):
            raise _Unlike(f"its added token {content!r} is found as a single word only")
        if is_word and values.get("normalized") and adds_prefix_space:
            raise _Unlike(f"its added token {content!r} is found after a space is put before it")
        yield AddedToken(
            content, number, is_word=is_word, strips_left=bool(values.get("lstrip")),
            strips_right=bool(values.get("rstrip")),
        )  # fmt: skip


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else text[:77] + "..."
