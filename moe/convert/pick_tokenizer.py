"""Which file becomes a converted model's tokenizer: the given one, or one of its folder.

A folder may hold the same tokenizer in several files. tokenizer.model comes first, as it is the
file that prepared data name; but where a fine-tune added tokens that it does not have, it would
split them in silence, so tokenizer.json is read, which has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from moe.convert.hf_folder import TOKENIZER_NAMES, HfFolder, about, listed, read_file
from moe.data.load_tokenizer import TextTokenizer, load_tokenizer
from moe.data.ranks_file import looks_like_ranks
from moe.data.read_tokenizer_json import looks_like_json
from moe.errors import DataError
from moe.train.tensor_header import parse_json_object

JSON_NAME, CONFIG_NAME, ADDED_NAME = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_WANTED = "tokenizer.model, cl100k_base.tiktoken, tokenizer.json"
_GIVE_ONE = "tokenizer=FILE adds one, and text needs one"
# files of tokenizers of other kinds, to name what was found
_OTHERS = ("vocab.json", "merges.txt", "spiece.model", "vocab.txt", "*.tiktoken", "tokenizer*")


class Picked(NamedTuple):
    """The file and its content, both None where there is none that can be used; what to say."""

    path: Path | None
    content: bytes | None
    note: str | None


def pick_tokenizer(given: Path | None, folder: HfFolder, *, vocab_size: int) -> Picked:
    """Choose and check; a given file must be right (DataError), the folder's may be odd."""
    named = _added_tokens(folder)
    if given is not None:
        content = read_tokenizer_file(given)
        tokenizer = load_tokenizer(given, vocab_size=vocab_size)
        lacking = _lacking(tokenizer, named)
        note = f"{_which(lacking, given.name)}; text will not hold them." if lacking else None
        return Picked(given, content, note)
    json_path = folder.folder / JSON_NAME if JSON_NAME in folder.kept_files else None
    problem = None
    if folder.tokenizer is not None:
        content = read_tokenizer_file(folder.tokenizer)
        try:
            tokenizer = load_tokenizer(folder.tokenizer, vocab_size=vocab_size)
        except DataError as error:
            problem = str(error)
        else:
            lacking = _lacking(tokenizer, named)
            if not lacking:
                return Picked(folder.tokenizer, content, None)
            problem = f"{_which(lacking, folder.tokenizer.name)}."
    if json_path is not None:
        try:
            load_tokenizer(json_path, vocab_size=vocab_size)
        except DataError as error:
            problem = f"{problem} {error}" if problem else str(error)
        else:
            return Picked(json_path, read_tokenizer_file(json_path), None)
    if problem is not None:
        return Picked(None, None, f"its tokenizer is kept but cannot be used here: {problem}")
    others = sorted({path.name for form in _OTHERS for path in folder.folder.glob(form)})
    others = [name for name in others if name != CONFIG_NAME]
    found = f" (found: {listed(others)})" if others else ""
    return Picked(None, None, f"no tokenizer was found: wanted {_WANTED}{found}. {_GIVE_ONE}.")


def tokenizer_file_name(content: bytes) -> str:
    """The name that a Hugging Face folder gives a tokenizer's file of this content."""
    if looks_like_json(content):
        return JSON_NAME
    pieces_name, ranks_name = TOKENIZER_NAMES
    return ranks_name if looks_like_ranks(content) else pieces_name


def _added_tokens(folder: HfFolder) -> dict[str, int]:
    """Every token that the folder's files name beside the vocabulary, with its id."""
    found: dict[str, int] = {}
    entries = _object(folder, JSON_NAME).get("added_tokens")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            _note(found, entry.get("content"), entry.get("id"))
    for content, number in _object(folder, ADDED_NAME).items():
        _note(found, content, number)
    decoder = _object(folder, CONFIG_NAME).get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and number.isdecimal():
            _note(found, entry.get("content"), int(number))
    return found


def _note(found: dict[str, int], content: Any, number: Any) -> None:
    if isinstance(content, str) and type(number) is int:
        found.setdefault(content, number)


def _object(folder: HfFolder, name: str) -> dict[str, Any]:
    raw = folder.kept_files.get(name)
    if raw is None:
        return {}
    with about(folder.folder / name, "Copy it again, or remove it."):
        return parse_json_object(raw)


def _lacking(tokenizer: TextTokenizer, named: dict[str, int]) -> dict[str, int]:
    """The named tokens that are not the tokenizer's under the same id."""
    own = tokenizer.special_ids
    first = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return {
        content: number
        for content, number in named.items()
        if own.get(content) != number and first.get(content) != number
    }


def _which(lacking: dict[str, int], name: str) -> str:
    tokens = [f"{content} ({number})" for content, number in lacking.items()]
    return f"the folder names tokens that {name} does not have: {listed(tokens)}"


def read_tokenizer_file(path: Path) -> bytes:
    """The content of a tokenizer's file; CheckpointError where it cannot be read."""
    with about(path, "Give tokenizer=FILE."):
        return read_file(path.parent, path.name)
