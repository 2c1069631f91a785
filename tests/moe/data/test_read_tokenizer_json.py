"""tokenizer.json read: the ids of the tokenizers library, added words, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe.convert.tokenizer_json import sentencepiece_json
from moe.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from moe.data.tokenizer_training import train_tokenizer
from moe.errors import DataError

tokenizers = pytest.importorskip("tokenizers")

MARK = "\u2581"
TEXTS = (
    "", " ", "a", "  lead and trail   ", "a\r\nb\n", "\t\tin\n\n\n  x", "nul\0inside \x1c",
    "emoji \U0001f600 \U0001f468\u200d\U0001f469", "x" * 500, " " * 500, "12345 it's",
    "\u4f60\u597d \u0645\u0631", "<0x41> <|user|> <s>", "\u3000\u3000a", "e\u0301 \u00bd",
)  # fmt: skip


def words_of_the_library() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:12]
    return [path.read_bytes().decode("utf-8", "replace") for path in files]


def random_texts() -> list[str]:
    dice = random.Random(0)
    letters = ("a", "ab", "a ", "\n ", "def (", "\u00e9 \U0001f600a", "=-1")
    return ["".join(dice.choices(one, k=dice.randint(1, 40))) for one in letters * 40]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "tokenizer.model"
    train_tokenizer(words_of_the_library(), vocab_size=800, output_path=path)
    return path


@pytest.fixture(scope="module")
def whole(own: Path) -> dict[str, Any]:
    """Our own export's tokenizer.json."""
    return sentencepiece_json(Tokenizer.load(own))


def as_published(whole: dict[str, Any]) -> dict[str, Any]:
    """The same pieces as the Phi-3 family's files spell them: marks, a prefix, merges as texts."""
    made = copy.deepcopy(whole)
    model = made["model"]
    model["vocab"] = {piece.replace(" ", MARK): n for piece, n in model["vocab"].items()}
    model["merges"] = [
        " ".join(part.replace(" ", MARK) for part in pair) for pair in model["merges"]
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    prepend = {"type": "Prepend", "prepend": MARK}
    made["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    back = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    made["decoder"] = {"type": "Sequence", "decoders": steps}
    for token in made["added_tokens"]:
        token["rstrip"] = token["content"] in SPECIAL_TOKENS[1:]
    return made


def one_pair_each(whole: dict[str, Any]) -> dict[str, Any]:
    """As a BPE trainer writes its merges: for each piece the one pair that it was made of."""
    made, seen = copy.deepcopy(whole), dict[str, int]()
    for left, right in made["model"]["merges"]:
        seen.setdefault(left + right, len(seen))
    kept = []
    for word, rank in seen.items():
        parts = list(word)
        while len(parts) > 2:
            ranks = [seen.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            place = ranks.index(min(ranks))
            if ranks[place] >= rank:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        kept += [parts] if len(parts) == 2 else []
    assert len(kept) == len(seen) < len(made["model"]["merges"])
    made["model"]["merges"] = kept
    return made


def metaspace(whole: dict[str, Any]) -> dict[str, Any]:
    made = as_published(whole)
    made["normalizer"] = None
    made["pre_tokenizer"] = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "never",
                             "split": False}  # fmt: skip
    made["decoder"]["decoders"].pop()
    return made


FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "own": copy.deepcopy, "published": as_published, "one pair each": one_pair_each,
    "metaspace": metaspace,
}  # fmt: skip


def loaded(tmp_path: Path, whole: dict[str, Any], **more: Any) -> tuple[Tokenizer, Any]:
    """The file opened by us and by the tokenizers library."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(whole))
    return Tokenizer.load(path, **more), tokenizers.Tokenizer.from_file(str(path))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_ids_of_the_tokenizers_library(
    whole: dict[str, Any], tmp_path: Path, form: str
) -> None:
    ours, theirs = loaded(tmp_path, FORMS[form](whole))
    theirs.encode_special_tokens = True  # a written <|user|> is text, as it is for us
    for text in (*TEXTS, *random_texts(), *words_of_the_library()[:4]):
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, repr(text[:80])
        assert ours.decode(ids) == text
    theirs.encode_special_tokens = False
    for text in ("<|user|>\n hi<|end|>\n<|assistant|>", "a<|endoftext|> b"):
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids


def test_our_own_file_read_back_is_the_tokenizer_that_it_was_written_from(
    own: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    before = Tokenizer.load(own)
    after, _ = loaded(tmp_path, whole)
    for name in ("special_ids", "num_pieces", "vocab_size", "stop_ids", "bos_id", "pad_id",
                 "adds_prefix_space", "masked_ids"):  # fmt: skip
        assert getattr(after, name) == getattr(before, name), name
    talk = [{"role": "user", "content": " Hi <|end|>"}]
    assert after.chat_ids(talk) == before.chat_ids(talk)
    assert sentencepiece_json(after) == whole


@pytest.mark.parametrize("form", FORMS)
def test_words_that_a_fine_tune_added_are_their_ids_in_texts_and_chats(
    whole: dict[str, Any], tmp_path: Path, form: str
) -> None:
    made = FORMS[form](whole)
    first = 1 + max(token["id"] for token in made["added_tokens"])
    words = [("<think>", False), ("<|tool|>", True), ("</think>", False), ("<think>ing", False)]
    for place, (content, swallows) in enumerate(words):
        made["added_tokens"].append({
            "id": first + place, "content": content, "single_word": False, "lstrip": False,
            "rstrip": swallows, "normalized": False, "special": True,
        })  # fmt: skip
    ours, theirs = loaded(tmp_path, made)
    for text in ("<think>", "a <think>b</think> c", "<|tool|>\n x", "<think>ing on", "x<|tool|>"):
        assert ours.encode(text) == theirs.encode(text).ids, text
    assert ours.encode("<think>")[-1] == first
    text = "a <think>b</think> c"
    assert ours.decode(ours.encode(text)) == text
    ids = ours.chat_ids([{"role": "user", "content": "<think>x<|end|>"}])
    assert ids.count(first) == 1
    assert ids.count(ours.special_ids["<|end|>"]) == 1  # written in a content it stays text
    with pytest.raises(DataError, match=f"Use {first + len(words)} or more"):
        loaded(tmp_path, made, vocab_size=first + len(words) - 1)


def change(whole: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(whole), **parts}


def change_model(whole: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return change(whole, model={**whole["model"], **parts})


def added(whole: dict[str, Any], **token: Any) -> dict[str, Any]:
    more = {"id": 5000, "content": "<x>", "normalized": False, **token}
    return change(whole, added_tokens=[*whole["added_tokens"], more])


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no object": (lambda w: {"vocab": {}}, "has no model with a vocab"),
    "another model": (lambda w: change_model(w, type="WordPiece"), r'model.type is "WordPiece"'),
    "no bytes": (lambda w: change_model(w, byte_fallback=False), "model.byte_fallback is false"),
    "dropout": (lambda w: change_model(w, dropout=0.1), "model.dropout is 0.1"),
    "lower case": (lambda w: change(w, normalizer={"type": "Lowercase"}), "normalizer is"),
    "words": (lambda w: change(w, pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer is"),
    "holes": (lambda w: change_model(w, vocab={**w["model"]["vocab"], "new": 9999}), "count up"),
    "no merges": (lambda w: change_model(w, merges=None), "no model.merges"),
    "odd merge": (lambda w: change_model(w, merges=[["a"]]), "no pair of pieces"),
    "unknown piece": (lambda w: change_model(w, merges=[["a", "\0"]]), "no piece of text"),
    "too few": (lambda w: change_model(w, merges=w["model"]["merges"][:9]), "merges lack pairs"),
    "twice": (lambda w: added(w, id=1), "comes twice"),
    "another id": (lambda w: added(w, id=300), "has the id 300 of"),
    "single word": (lambda w: added(w, single_word=True), "single word"),
    "normalised": (lambda w: added(as_published(w), normalized=True), "after a space is put"),
    "no end": (lambda w: change(w, added_tokens=[]), r"no token <\|endoftext\|>"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_give_other_ids_is_refused_by_name(
    whole: dict[str, Any], tmp_path: Path, name: str
) -> None:
    edit, words = REFUSED[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(edit(whole)))
    with pytest.raises(DataError, match=words) as error:
        Tokenizer.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_text_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(DataError, match=r"tokenizer\.json: is not JSON"):
        Tokenizer.load(tmp_path / "tokenizer.json")
