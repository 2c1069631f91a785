"""Our tokenizers as the `tokenizer.json` of the tokenizers library, with the same ids for any text.

SentencePiece's BPE and tiktoken join, again and again, the two neighbours whose union is the best
piece, the leftmost pair first; the tokenizers library joins pairs in the order of a list. So the
list holds every pair whose union is a piece, in the order of the pieces.

SentencePiece writes a space as U+2581 inside its pieces. Here the pieces hold the space itself:
a U+2581 in a text then falls back to its bytes, as it does in moe/data/tokenizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from moe.convert.sentencepiece_pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    read_pieces,
)
from moe.data.sentencepiece_model import SPACE_MARK
from moe.data.tiktoken_tokenizer import TiktokenTokenizer
from moe.data.tokenizer import Tokenizer
from moe.errors import DataError

# the words of moe.data.tiktoken_tokenizer.PATTERN for the tokenizers library, whose expressions
# read {1,3}+ as any number of digits, and $ as the end of any line
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+(?![\s\S])|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KIND_NAMES = {USER_DEFINED: "user-defined", UNUSED: "unused"}


def sentencepiece_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece tokenizer; the file itself where it was read from one.

    Raises DataError for pieces that the format cannot express: user-defined or unused ones, two of
    the same score, or one with a character that is no piece of its own.
    """
    if tokenizer.is_json:
        return json.loads(tokenizer.model_bytes()) | {"post_processor": None}
    pieces = read_pieces(tokenizer.model_bytes())
    words = [piece.text.replace(SPACE_MARK, " ") for piece in pieces]
    normal = {word: n for n, word in enumerate(words) if pieces[n].kind == NORMAL}
    _check_pieces(pieces, normal)
    order = sorted(normal, key=lambda word: (-pieces[normal[word]].score, normal[word]))
    controls = [n for n, piece in enumerate(pieces) if piece.kind in (UNKNOWN, CONTROL)]
    added = [_added(n, words[n]) for n in controls]
    added += [
        _added(token.id, token.content, swallows=token.strips_right)
        for token in tokenizer.added_tokens
    ]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    return _document(
        added=added,
        normalizer={"type": "Prepend", "prepend": " "} if tokenizer.adds_prefix_space else None,
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [*decoders, *(strip if tokenizer.adds_prefix_space else [])],
        },
        model={
            "unk_token": words[controls[0]],
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {word: n for n, word in enumerate(words)},
            "merges": _merges(order, normal),
        },
    )


def tiktoken_json(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """tokenizer.json of a tiktoken tokenizer: the bytes of its tokens written as characters."""
    characters = _byte_characters()
    words = ["".join(characters[byte] for byte in token) for token in tokenizer.token_bytes]
    rank_of = {word: rank for rank, word in enumerate(words)}
    return _document(
        added=[_added(n, token) for token, n in tokenizer.special_ids.items()],
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(),
            ],
        },
        decoder=_byte_level(),
        model={
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a whole word that is a token is that token, as in tiktoken
            "vocab": rank_of,
            "merges": _merges(words, rank_of),
        },
    )


def _merges(order: Iterable[str], known: Mapping[str, int]) -> list[list[str]]:
    """Every [left, right] whose union is a word, for the words in order."""
    return [
        [word[:cut], word[cut:]]
        for word in order
        for cut in range(1, len(word))
        if word[:cut] in known and word[cut:] in known
    ]


def _check_pieces(pieces: list[Piece], normal: Mapping[str, int]) -> None:
    cannot = "tokenizer.model: cannot be written as tokenizer.json with the same ids: "
    for number, piece in enumerate(pieces):
        if piece.kind not in (NORMAL, UNKNOWN, CONTROL, BYTE):
            kind = _KIND_NAMES.get(piece.kind, f"of kind {piece.kind}")
            raise DataError(f"{cannot}piece {number}, {piece.text!r}, is {kind}.")
    number_of: dict[float, int] = {}
    for word, number in normal.items():
        if len(word) == 1:
            continue
        missing = sorted(set(word) - normal.keys())
        if missing:
            raise DataError(
                f"{cannot}piece {number}, {word!r}, has {missing[0]!r}, which is no piece."
            )
        other = number_of.setdefault(pieces[number].score, number)
        if other != number:
            raise DataError(
                f"{cannot}pieces {other} and {number} have the same score, {pieces[number].score}."
            )


def _document(**parts: Any) -> dict[str, Any]:
    model = {
        "type": "BPE", "dropout": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, **parts["model"],
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": parts["added"],
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": None,
        "decoder": parts["decoder"],
        "model": model,
    }


def _added(number: int, token: str, *, swallows: bool = False) -> dict[str, Any]:
    return {
        "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": swallows,
        "normalized": False, "special": True,
    }  # fmt: skip


def _byte_level() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table).

    A printable byte of Latin-1 stands for itself, the others for U+0100 and on, in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
