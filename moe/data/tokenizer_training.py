"""How a tokenizer.model is trained: SentencePiece BPE on the user's text, the same bytes each time.

Code is text here: nothing is normalised, indentation and newlines are part of the pieces, and every
character outside the alphabet falls back to its bytes, so that any text comes back exactly.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe.data.sentencepiece_model import SPACE_MARK
from moe.data.tokenizer import SPECIAL_TOKENS, num_pieces_for
from moe.errors import DataError

LEAST_VOCAB_SIZE = 512  # as TokenizerConfig allows
NUM_RESERVED = 3 + 256  # <unk>, <s>, </s> and the bytes
CHARACTER_COVERAGE = 0.9995
SENTENCE_CHARACTERS = 4096  # what the trainer reads at once; longer text is cut at a line


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, output_path: str | Path) -> None:
    """Train num_pieces_for(vocab_size) pieces on texts and write them to output_path.

    The same texts in the same order give the same file, byte for byte. Raises DataError if
    the texts cannot fill the vocabulary, naming the largest vocab_size that they can.
    """
    sentences = [part for text in texts for part in _sentences(text)]
    num_pieces = num_pieces_for(vocab_size)
    if num_pieces <= NUM_RESERVED:
        raise DataError(
            f"tokenizer.vocab_size: got {vocab_size}; the bytes and the special tokens alone take "
            f"{NUM_RESERVED + len(SPECIAL_TOKENS)}. Use {LEAST_VOCAB_SIZE} or more."
        )
    alphabet = _alphabet(sentences, num_characters=(num_pieces - NUM_RESERVED) // 2)
    if not alphabet:
        raise DataError("data.sources: there is no text to train the tokenizer on; add text.")
    model = _train(_only(sentences, alphabet), num_pieces=num_pieces, vocab_size=vocab_size)
    Path(output_path).write_bytes(model)


def _train(sentences: Iterator[str], *, num_pieces: int, vocab_size: int) -> bytes:
    try:
        from sentencepiece import SentencePieceTrainer
    except ModuleNotFoundError:
        raise DataError(
            "the package sentencepiece is not installed; a tokenizer cannot be trained without "
            "it. Install it with: pip install sentencepiece"
        ) from None
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model,
            model_type="bpe", vocab_size=num_pieces, byte_fallback=True, character_coverage=1.0,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, allow_whitespace_only_pieces=True,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            max_sentence_length=8 * SENTENCE_CHARACTERS,  # bytes
            num_threads=1,  # the number is written into the model file
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        largest = re.search(r"Please set it to a value <= (\d+)", str(error))
        if largest is None:
            raise DataError(
                f"tokenizer.vocab_size={vocab_size}: training failed: {error}"
            ) from None
        possible = int(largest.group(1)) + len(SPECIAL_TOKENS)
        fitting = (
            f"The largest possible value for this text is {possible}: use "
            f"tokenizer.vocab_size={possible}, or give more text in data.sources."
            if possible >= LEAST_VOCAB_SIZE
            else f"The largest possible number of ids for this text, {possible}, is less than the "
            f"smallest vocabulary, {LEAST_VOCAB_SIZE}: give more text in data.sources."
        )
        raise DataError(
            f"tokenizer.vocab_size: got {vocab_size}, but the text has too few different words to "
            f"fill it. {fitting}"
        ) from None
    return model.getvalue()


def _sentences(text: str) -> Iterator[str]:
    """Cut text at line ends into parts that the trainer does not skip for their length."""
    start = 0
    while start < len(text):
        stop = min(start + SENTENCE_CHARACTERS, len(text))
        if stop < len(text):
            line_end = text.rfind("\n", start, stop)
            stop = line_end + 1 if line_end > start else stop
        yield text[start:stop]
        start = stop


def _alphabet(sentences: list[str], *, num_characters: int) -> set[str]:
    """The most frequent characters that cover CHARACTER_COVERAGE of the text, at most so many.

    The limit keeps half of the merges for words when the text has thousands of characters.
    """
    count: Counter[str] = Counter()
    for sentence in sentences:
        count.update(sentence)
    # the trainer reserves these four: NUL, its own marks for space and unknown, and half characters
    for reserved in ("\0", SPACE_MARK, "\u2585", "\ufffd"):
        count.pop(reserved, None)
    total, covered = count.total(), 0
    alphabet: set[str] = set()
    for character, number in sorted(count.items(), key=lambda item: (-item[1], item[0])):
        if covered >= CHARACTER_COVERAGE * total or len(alphabet) == num_characters:
            break
        alphabet.add(character)
        covered += number
    return alphabet


def _only(sentences: list[str], alphabet: set[str]) -> Iterator[str]:
    """The sentences with every other character replaced by a space, which ends a word."""
    rare = {character for sentence in sentences for character in set(sentence)} - alphabet
    table = dict.fromkeys(map(ord, rare), " ")
    return (sentence.translate(table) for sentence in sentences)
