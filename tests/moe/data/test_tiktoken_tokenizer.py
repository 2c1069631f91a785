"""moe/data/tiktoken_tokenizer.py: published ids, exact round trips, cuts that change nothing."""

from __future__ import annotations

import base64
import itertools
import pickle
import random
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
from tiktoken_ext import openai_public

from moe.data import tiktoken_tokenizer
from moe.data.tiktoken_tokenizer import PATTERN, SPECIAL_TOKENS, TiktokenTokenizer
from moe.errors import DataError

PUBLISHED = {
    "<|dummy_id_2|>": 100256, "<|endoftext|>": 100257, "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|system|>": 100261, "<|user|>": 100262,
    "<|assistant|>": 100263, "<|dummy_id_0|>": 100264, "<|dummy_id_1|>": 100265, "<|end|>": 100266,
    "<|dummy_id_3|>": 100267, "<|dummy_id_11|>": 100275, "<|endofprompt|>": 100276,
    "<|dummy_id_12|>": 100277, "<|dummy_id_86|>": 100351,
}  # fmt: skip
NUM_PUBLISHED_RANKS = 100_256
HARD = (
    "", " ", "a", "\n", "  leading and trailing   ", "a\r\nb\rc\n", "tab\t\tin\tdentation\n\n\n  x",
    "nul\0inside \x1c\x1d\x1e\x1f x", "emoji \U0001f600 \U0001f468\u200d\U0001f469", "x" * 5000,
    "it's IT'S we'LL '\u017f 'x", "1234567 12 \u0661\u0662\u0663\u0664", "!!!\n\n!?\r\n ?",
    "\ufeffbom \u2581 \ufffd\uffff\x85\u2028\u3000z", "e\u0301 \u00e9 \ufb01 \u00bd \uff21",
    "\u4f60\u597d \u0645\u0631\u062d\u0628\u0627", "<|user|><|dummy_id_12|>|>", "\u2003\u2003a",
)  # fmt: skip


def library_text(*, max_characters: int) -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_bytes().decode("utf-8", "replace") for path in files[:80])
    return text[:max_characters]


def train_ranks(text: str, *, num_merges: int) -> list[bytes]:
    """Byte-pair encoding in its plainest form: merge the commonest pair, so many times."""
    words = [
        ([bytes([byte]) for byte in word.encode()], count)
        for word, count in Counter(re.findall(r" ?\w+|\s+| ?[^\w\s]+", text)).items()
    ]
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(num_merges):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words:
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        (left, right), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        tokens.append(left + right)
        for word, _ in words:
            place = 0
            while place < len(word) - 1:
                if word[place] == left and word[place + 1] == right:
                    word[place : place + 2] = [left + right]
                place += 1
    assert len(set(tokens)) == len(tokens)
    return tokens


def write_ranks(tokens: list[bytes], path: Path) -> Path:
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    )
    return path


@pytest.fixture(scope="module")
def ranks_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = library_text(max_characters=60_000) + "\u4f60\u597d \U0001f600\U0001f601 \u00e9" * 50
    folder = tmp_path_factory.mktemp("ranks")
    return write_ranks(train_ranks(text, num_merges=250), folder / "own.tiktoken")


@pytest.fixture(scope="module")
def tokenizer(ranks_path: Path) -> TiktokenTokenizer:
    return TiktokenTokenizer.load(ranks_path)


@pytest.fixture(scope="module")
def original(tokenizer: TiktokenTokenizer) -> tiktoken.Encoding:
    """tiktoken itself, set up as the original tokenizer sets it up."""
    return tiktoken.Encoding(
        "original",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokenizer.token_bytes)},
        special_tokens=tokenizer.special_ids,
    )


def test_a_file_as_large_as_cl100k_base_has_the_published_ids(tmp_path: Path) -> None:
    letters = [bytes([byte]) for byte in range(256)]
    longer = (bytes(word) for word in itertools.product(range(256), repeat=3))
    tokens = [*letters, *itertools.islice(longer, NUM_PUBLISHED_RANKS - 256)]
    tokenizer = TiktokenTokenizer.load(write_ranks(tokens, tmp_path / "large.tiktoken"))
    assert tokenizer.vocab_size == 100_352
    assert tokenizer.special_ids.items() >= PUBLISHED.items()
    assert sorted(tokenizer.special_ids.values()) == list(range(100_256, 100_352))
    assert list(tokenizer.special_ids) == list(SPECIAL_TOKENS)
    assert tokenizer.stop_ids == (100_257, 100_266)
    assert tokenizer.bos_id == tokenizer.pad_id == tokenizer.end_of_text_id == 100_257
    assert set(range(100_256, 100_352)) - set(tokenizer.masked_ids) == {
        100_257, 100_261, 100_262, 100_263, 100_266,
    }  # fmt: skip


def test_the_special_tokens_of_a_small_file_follow_its_last_rank(
    tokenizer: TiktokenTokenizer,
) -> None:
    shift = NUM_PUBLISHED_RANKS - 506
    assert tokenizer.num_pieces == 506
    assert tokenizer.special_ids.items() >= {t: n - shift for t, n in PUBLISHED.items()}.items()
    assert tokenizer.vocab_size == 640  # 506 + 96, to the next multiple of 64
    assert tokenizer.masked_ids[:2] == (506, 508)


def test_the_pattern_and_the_shared_ids_are_those_of_cl100k_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})  # no network
    cl100k = openai_public.cl100k_base()
    assert cl100k["pat_str"] == PATTERN
    for token, number in cl100k["special_tokens"].items():
        assert SPECIAL_TOKENS[number - NUM_PUBLISHED_RANKS] == token


@pytest.mark.parametrize("text", HARD)
def test_any_text_comes_back_exactly(
    tokenizer: TiktokenTokenizer, original: tiktoken.Encoding, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == original.encode_ordinary(text)
    assert all(0 <= number < tokenizer.num_pieces for number in ids)


def test_every_character_of_unicode_comes_back(
    tokenizer: TiktokenTokenizer, original: tiktoken.Encoding
) -> None:
    points = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 16)]
    text = "".join(map(chr, points))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == original.encode_ordinary(text)


def random_text(rng: random.Random, *, length: int) -> str:
    """Runs of white space, newlines, letters, digits, marks: where the pattern has its edges."""
    parts = (
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u3000",
        "\x85",
        "\x1c",
        "a",
        "\u00e9x",
        "1",
        "!",
        "'s",
    )
    return "".join(rng.choice(parts) * rng.choice((1, 1, 1, 2, 7)) for _ in range(length))


def test_cutting_text_anywhere_it_may_be_cut_does_not_change_its_ids(
    tokenizer: TiktokenTokenizer, original: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiktoken_tokenizer, "SEGMENT_CHARACTERS", 1)
    pattern = tiktoken_tokenizer._LONG_SPACE_PATTERN.pattern.replace("1000", "2")
    monkeypatch.setattr(tiktoken_tokenizer, "_LONG_SPACE_PATTERN", re.compile(pattern))
    rng = random.Random(0)
    num_segments = 0
    for _ in range(1500):
        text = random_text(rng, length=rng.randint(1, 30))
        assert tokenizer.encode(text) == original.encode_ordinary(text), repr(text)
        segments = list(tiktoken_tokenizer._segments(text))
        assert "".join(segments) == text
        num_segments += len(segments)
    assert num_segments > 5000


def test_a_long_text_is_cut_and_has_the_ids_of_the_whole(
    tokenizer: TiktokenTokenizer, original: tiktoken.Encoding
) -> None:
    text = library_text(max_characters=500_000)
    assert len(list(tiktoken_tokenizer._segments(text))) >= 7
    assert tokenizer.encode(text) == original.encode_ordinary(text)


@pytest.mark.parametrize(
    ("text", "num_tokens"),
    [("a" * 10**6, 10**6), (" " * 10**6 + "x", None), ("!\n" + "\t " * 500_000 + "\n x", None),
     ("\u3000" * 10**6 + "1", None)],
)  # fmt: skip
def test_a_million_characters_of_one_kind_are_encoded(
    tokenizer: TiktokenTokenizer, text: str, num_tokens: int | None
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert num_tokens is None or len(ids) == num_tokens


def test_text_cannot_forge_a_special_token_unless_it_may(
    tokenizer: TiktokenTokenizer, original: tiktoken.Encoding
) -> None:
    text = "a<|user|>  b<|endoftext|><|end|>\n<|dummy_id_1|><|dummy_id_12|> <|nothing|>"
    assert max(tokenizer.encode(text)) < tokenizer.num_pieces
    allowed = tokenizer.encode(text, allow_special=True)
    assert allowed == original.encode(text, allowed_special="all")
    assert sum(number >= tokenizer.num_pieces for number in allowed) == 5
    assert tokenizer.decode(allowed, keep_special=True) == text
    assert tokenizer.decode(allowed) == "a  b\n <|nothing|>"


def test_half_a_surrogate_pair_is_refused(tokenizer: TiktokenTokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_a_stream_waits_for_the_rest_of_a_character(tokenizer: TiktokenTokenizer) -> None:
    text = "a\U0001f680b"
    ids = tokenizer.encode(text)
    assert len(ids) > 3
    parts = list(tokenizer.decode_stream(ids, starts_text=True))
    assert "".join(parts) == text
    assert "" in parts[:-1]
    assert "\ufffd" not in "".join(parts)
    assert list(tokenizer.decode_stream(ids[:2]))[-1] == "\ufffd"
    unused = tokenizer.vocab_size - 1
    assert tokenizer.decode([unused, 10**6, -1, *ids]) == text


def test_chats_are_written_with_the_tokens_of_the_file(tokenizer: TiktokenTokenizer) -> None:
    special, encode = tokenizer.special_ids, tokenizer.encode
    messages = [{"role": "user", "content": "Hi <|end|>"}]
    assert tokenizer.chat_ids(messages, template="phi3_small") == [
        special["<|endoftext|>"], special["<|user|>"], *encode("\nHi <|end|>"), special["<|end|>"],
        *encode("\n"), special["<|assistant|>"], *encode("\n"),
    ]  # fmt: skip
    closed = tokenizer.chat_ids(messages, template="phi3_small", add_generation_prompt=False)
    assert closed[-1] == special["<|endoftext|>"]
    with pytest.raises(DataError, match=r"'phi3_april', which writes <s>.*phi3_small"):
        tokenizer.chat_ids(messages, template="phi3_april")


def test_a_tokenizer_survives_pickling(tokenizer: TiktokenTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("def f():\n    pass") == tokenizer.encode("def f():\n    pass")
    assert (copy.vocab_size, copy.sha256) == (tokenizer.vocab_size, tokenizer.sha256)
    assert len(pickle.dumps(tokenizer)) < 1000


def test_a_vocabulary_without_room_for_the_special_tokens_is_refused(ranks_path: Path) -> None:
    assert TiktokenTokenizer.load(ranks_path, vocab_size=602).vocab_size == 602
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: got 601.*Use 602"):
        TiktokenTokenizer.load(ranks_path, vocab_size=601)


def test_without_tiktoken_the_message_says_how_to_install_it(
    ranks_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match="pip install tiktoken"):
        TiktokenTokenizer.load(ranks_path)
