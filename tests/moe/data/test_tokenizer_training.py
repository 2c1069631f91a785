"""moe/data/tokenizer_training.py: the same file each time, no noise, errors that name the fix."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe.data.tokenizer import Tokenizer
from moe.data.tokenizer_training import train_tokenizer
from moe.errors import DataError

TRAIN = """
import random, sys
from moe.data.tokenizer_training import train_tokenizer
generator = random.Random(5)
letters = "abcdefgh \\n\\t" + chr(0xe9) + chr(0x2581)
texts = ["".join(generator.choices(letters, k=3000)) for _ in range(20)]
# equally rare characters, more than the alphabet takes: which of them are in it must not vary
texts += ["".join(chr(0x4E00 + number) for number in range(400)) * 3]
train_tokenizer(texts, vocab_size=600, output_path=sys.argv[1])
"""


def test_the_same_text_gives_the_same_file_in_any_process(tmp_path: Path) -> None:
    models = []
    for seed in ("1", "2"):
        output = tmp_path / f"folder{seed}" / "tokenizer.model"
        output.parent.mkdir()
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(output)],
            env=environment, cwd=output.parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (done.stdout, done.stderr) == ("", "")
        models.append(output.read_bytes())
    assert models[0] == models[1]


def test_too_little_text_names_the_largest_vocabulary_which_works(tmp_path: Path) -> None:
    texts = ["hello world, this is all there is to read. "] * 3
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: got 4096") as caught:
        train_tokenizer(texts, vocab_size=4096, output_path=tmp_path / "a.model")
    # a size that the configuration refuses is never advised
    assert "tokenizer.vocab_size=" not in str(caught.value)
    largest = re.search(
        r"ids for this text, (\d+), is less than the smallest.*512", str(caught.value)
    )
    assert largest is not None
    size = int(largest.group(1))
    assert not (tmp_path / "a.model").exists()
    train_tokenizer(texts, vocab_size=size, output_path=tmp_path / "b.model")
    assert Tokenizer.load(tmp_path / "b.model", vocab_size=size).num_pieces == size - 11
    with pytest.raises(DataError, match=f"got {size + 1}"):
        train_tokenizer(texts, vocab_size=size + 1, output_path=tmp_path / "c.model")


def test_a_vocabulary_beyond_the_text_names_one_that_is_allowed(tmp_path: Path) -> None:
    generator = random.Random(0)
    texts = [" ".join("".join(generator.choices("abcd", k=6)) for _ in range(400))]
    with pytest.raises(DataError, match=r"use tokenizer\.vocab_size=(\d+), or give") as caught:
        train_tokenizer(texts, vocab_size=4096, output_path=tmp_path / "a.model")
    size = int(str(caught.value).split("tokenizer.vocab_size=")[1].split(",")[0])
    assert size >= 512
    train_tokenizer(texts, vocab_size=size, output_path=tmp_path / "b.model")


@pytest.mark.parametrize("texts", [[], [""], ["\0\0"]])
def test_no_text_is_an_error(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"data\.sources: there is no text"):
        train_tokenizer(texts, vocab_size=600, output_path=tmp_path / "a.model")


def test_a_vocabulary_smaller_than_the_bytes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: got 200"):
        train_tokenizer(["some text"], vocab_size=200, output_path=tmp_path / "a.model")


def test_more_characters_than_pieces_still_trains(tmp_path: Path) -> None:
    generator = random.Random(0)
    letters = [chr(0x4E00 + number) for number in range(3000)]
    words = ["".join(generator.choices(letters, k=2)) for _ in range(300)]
    text = " ".join(generator.choices(words, k=20_000)) + " " + " ".join(letters)
    train_tokenizer([text], vocab_size=600, output_path=tmp_path / "a.model")
    tokenizer = Tokenizer.load(tmp_path / "a.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # some merges are left for words: fewer tokens than characters of the frequent words' text
    assert any(len(tokenizer.encode(" " + word)) == 1 for word in words)


def test_a_long_line_is_not_skipped(tmp_path: Path) -> None:
    # SentencePiece leaves out sentences over its length limit, so a file of one line would be lost
    line = "alpha beta gamma delta " * 20_000
    words = " ".join(f"w{number}x{number * 7919 % 977}" for number in range(400))
    train_tokenizer([line + words], vocab_size=600, output_path=tmp_path / "a.model")
    tokenizer = Tokenizer.load(tmp_path / "a.model")
    assert len(tokenizer.encode(" alpha beta gamma delta")) == 4
