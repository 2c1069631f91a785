"""moe/convert/tokenizer_files.py: transformers opens the files, and gives our ids and texts."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from moe.config import CHAT_TEMPLATE_NAMES
from moe.convert.tokenizer_files import hugging_face_tokenizer_files
from moe.data.load_tokenizer import TextTokenizer, load_tokenizer
from moe.data.tokenizer_training import train_tokenizer
from moe.errors import DataError

transformers = pytest.importorskip("transformers")

HARD = (
    "", " ", "a", "\n", "  leading and trailing   ", "a\r\nb\rc\n", "tab\t\tin\tdentation\n\n\n  x",
    "nul\0inside \x1c\x1d x", "emoji \U0001f600 \U0001f468\u200d\U0001f469", "x" * 3000, " " * 3000,
    "it's IT'S we'LL '\u017f 'x", "1234567 12 \u0661\u0662\u0663\u0664", "!!!\n\n!?\r\n ?",
    "\ufeffbom \u2581 \u2581\u2581x \ufffd\uffff\x85\u2028\u3000z", "e\u0301 \u00e9 \ufb01 \u00bd",
    "\u4f60\u597d \u0645\u0631\u062d\u0628\u0627", "<0x41> <0x> <|nothing|>", "\u2003\u2003a",
)  # fmt: skip
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hi there\n"},
    {"role": "assistant", "content": "Hello <b>"},
    {"role": "user", "content": "\u2581 Bye"},
]
KINDS = ("own", "llama", "tiktoken")


def library_texts() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_bytes().decode("utf-8", "replace") for path in files[:25]]


def llama_like_model(**changes: Any) -> bytes:
    """A model with Llama-2's flags: a space is put before each text."""
    model = io.BytesIO()
    flags: dict[str, Any] = {
        "vocab_size": 700, "model_type": "bpe", "byte_fallback": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "add_dummy_prefix": True, "allow_whitespace_only_pieces": True, "minloglevel": 2,
        "max_sentence_length": 1 << 20, "num_threads": 1,
    }  # fmt: skip
    texts = [text[:20_000] for text in library_texts()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **{**flags, **changes}
    )
    return model.getvalue()


def ranks() -> bytes:
    """Bytes, then merges of words and of white space that overlap in many ways."""
    tokens = [bytes([byte]) for byte in range(256)]
    text = " ".join(library_texts())[:100_000].encode()
    for size in (2, 3, 4, 5, 8):
        found = Counter(text[place : place + size] for place in range(0, len(text) - size))
        tokens += [token for token, _ in found.most_common(120)]
    tokens += [
        "\u00e9".encode(),
        "\u4f60".encode(),
        b"\xf0\x9f\x98",
        b"aa",
        b"aaa",
        b"abab",
        b"bab",
    ]
    unique = list(dict.fromkeys(tokens))
    return b"".join(base64.b64encode(token) + b" %d\n" % n for n, token in enumerate(unique))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tokenizer file of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    paths = {kind: folder / f"{kind}.model" for kind in KINDS}
    train_tokenizer(library_texts(), vocab_size=1024, output_path=paths["own"])
    paths["llama"].write_bytes(llama_like_model())
    paths["tiktoken"].write_bytes(ranks())
    return paths


def opened(tokenizer: TextTokenizer, folder: Path, **changes: Any) -> Any:
    """The files in a folder, opened by transformers."""
    settings = {"chat_template": "phi35", "max_length": 100_000, "adds_bos": False, **changes}
    for name, content in hugging_face_tokenizer_files(tokenizer, **settings).items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


def samples() -> list[str]:
    """Hard cases, code, and random texts: repeated letters, white space, all of Unicode."""
    rng = random.Random(0)
    texts = [*HARD, *library_texts()[:8]]
    for letters in (
        "a",
        "ab",
        "a ",
        "=-",
        "\n ",
        "\n\t ",
        "aA_ 0",
        "1 ",
        "\u00e9\u2581 \U0001f600a",
    ):
        texts += ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(60)]
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    return texts + ["".join(map(chr, rng.choices(points, k=20))) for _ in range(200)]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_ids_and_texts(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    tokenizer = load_tokenizer(folders[kind])
    theirs = opened(tokenizer, tmp_path)
    for text in samples():
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids, repr(text[:80])
        assert theirs.decode(ids) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["phi3", "phimoe", None])
def test_a_text_begins_with_the_first_token_where_the_model_is_used_to_it(
    folders: dict[str, Path], tmp_path: Path, kind: str, model_type: str | None
) -> None:
    if model_type is not None:  # beside a model transformers may take a class for its tokenizer
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(folders[kind])
    theirs = opened(tokenizer, tmp_path, adds_bos=True)
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in HARD:
        ids = tokenizer.encode(text)
        for one in (theirs, again):
            assert one.encode(text) == [tokenizer.bos_id, *ids], repr(text[:80])
            assert one.encode(text, add_special_tokens=False) == ids
            assert one.decode([tokenizer.bos_id, *ids], skip_special_tokens=True) == text
    for one in (theirs, again):  # a chat template writes what the model is used to by itself
        chat = one.apply_chat_template(CONVERSATION, return_dict=False)
        assert chat == tokenizer.chat_ids(CONVERSATION, add_generation_prompt=False)


def test_every_character_of_unicode_has_the_same_ids(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folders["tiktoken"])
    theirs = opened(tokenizer, tmp_path)
    points = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 64)]
    for start in range(0, len(points), 500):
        text = "".join(f"a{chr(p)}1{chr(p)}{chr(p)}! {chr(p)}" for p in points[start : start + 500])
        assert theirs.encode(text) == tokenizer.encode(text), hex(points[start])


@pytest.mark.parametrize("kind", KINDS)
def test_written_special_tokens_mean_the_same(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    tokenizer = load_tokenizer(folders[kind])
    theirs = opened(tokenizer, tmp_path)
    rng = random.Random(1)
    special = ["<|user|>", "<|end|>", "<|endoftext|>", "<|assistant|>", "<|system|>"]
    for _ in range(300):
        text = "".join(rng.choices([*special, " ", "\n ", "\x1c", "\u3000", "word"], k=8))
        assert theirs.encode(text) == tokenizer.encode(text, allow_special=True), repr(text)
    split = theirs("a<|user|>b<s>", split_special_tokens=True)["input_ids"]
    assert split == tokenizer.encode("a<|user|>b<s>")


@pytest.mark.parametrize("kind", KINDS)
def test_the_special_tokens_are_those_of_phi(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    tokenizer = load_tokenizer(folders[kind])
    theirs = opened(tokenizer, tmp_path, max_length=512)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id, tokenizer.end_of_text_id, tokenizer.pad_id,
    )  # fmt: skip
    assert theirs.unk_token == (None if kind == "tiktoken" else "<unk>")
    assert (theirs.padding_side, theirs.model_max_length) == ("left", 512)
    assert theirs.convert_tokens_to_ids(list(tokenizer.special_ids)) == list(
        tokenizer.special_ids.values()
    )
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == tokenizer.special_ids
    marks = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert marks["eos_token"] == marks["pad_token"] == "<|endoftext|>"
    ids = [tokenizer.special_ids["<|user|>"], *tokenizer.encode("hi"), tokenizer.end_of_text_id]
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == "hi"
    batch = theirs(["a", "a b c"], padding=True)
    assert batch["input_ids"][0][0] == tokenizer.pad_id
    assert batch["attention_mask"][0][0] == 0


@pytest.mark.parametrize(
    ("kind", "template"),
    # phi3_april writes <s>, which tiktoken's vocabulary has not
    [pair for pair in itertools.product(KINDS, CHAT_TEMPLATE_NAMES)
     if pair != ("tiktoken", "phi3_april")],
)  # fmt: skip
def test_chats_have_our_ids(
    folders: dict[str, Path], tmp_path: Path, kind: str, template: str
) -> None:
    tokenizer = load_tokenizer(folders[kind])
    theirs = opened(tokenizer, tmp_path, chat_template=template)
    for length, prompted in itertools.product(range(1, 5), (True, False)):
        ids = theirs.apply_chat_template(
            CONVERSATION[:length], add_generation_prompt=prompted, return_dict=False
        )
        assert ids == tokenizer.chat_ids(
            CONVERSATION[:length], template=template, add_generation_prompt=prompted
        )


@pytest.mark.parametrize("template", ["phi35", "phi3_april", "phi3_medium", "phi3_small"])
def test_an_answer_that_is_begun_has_our_ids(
    folders: dict[str, Path], tmp_path: Path, template: str
) -> None:
    tokenizer = load_tokenizer(folders["own"])
    theirs = opened(tokenizer, tmp_path, chat_template=template)
    ids = theirs.apply_chat_template(
        CONVERSATION[:3], continue_final_message=True, return_dict=False
    )
    assert ids == tokenizer.chat_ids(CONVERSATION[:3], template=template, continues_answer=True)


@pytest.mark.parametrize("model_type", ["phi3", "phimoe", "phi3small"])
def test_a_model_beside_the_files_does_not_change_how_they_are_read(
    folders: dict[str, Path], tmp_path: Path, model_type: str
) -> None:
    tokenizer = load_tokenizer(folders["tiktoken" if model_type == "phi3small" else "own"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = opened(tokenizer, tmp_path)
    for text in HARD:
        assert theirs.encode(text) == tokenizer.encode(text)


def test_saving_them_again_keeps_the_ids(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders["llama"])
    opened(tokenizer, tmp_path).save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert [again.encode(text) for text in HARD] == [tokenizer.encode(text) for text in HARD]
    assert again.apply_chat_template(CONVERSATION, return_dict=False) == tokenizer.chat_ids(
        CONVERSATION, add_generation_prompt=False
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_itself_is_given_byte_for_byte(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    tokenizer = load_tokenizer(folders[kind])
    files = hugging_face_tokenizer_files(
        tokenizer, chat_template="phi35", max_length=8, adds_bos=True
    )
    assert files["tokenizer.model"] == folders[kind].read_bytes()
    assert set(files) == {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json",
    }  # fmt: skip


def test_a_file_changed_after_it_was_loaded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "llama.model"
    path.write_bytes(llama_like_model(vocab_size=400))
    tokenizer = load_tokenizer(path)
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(DataError, match=r"llama\.model: was changed after it was loaded"):
        hugging_face_tokenizer_files(tokenizer, chat_template="phi35", max_length=8, adds_bos=True)


def test_pieces_that_tokenizer_json_cannot_express_are_named(tmp_path: Path) -> None:
    path = tmp_path / "user.model"
    path.write_bytes(llama_like_model(user_defined_symbols=["def"]))
    with pytest.raises(DataError, match=r"same ids: piece \d+, 'def', is user-defined"):
        hugging_face_tokenizer_files(
            load_tokenizer(path), chat_template="phi35", max_length=8, adds_bos=True
        )
