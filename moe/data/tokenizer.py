"""Text to token ids and back: SentencePiece BPE with byte fallback, plus the Phi special tokens.

The ids: the model file's P pieces (<unk> 0, <s> 1, </s> 2, 256 bytes, merges), then the 11 special
tokens, then unused rows up to vocab_size. With the 32000 pieces of Llama-2 the special tokens
are exactly Phi's ids 32000 to 32010, and the vocabulary is 32064.

The special tokens live outside the SentencePiece model, so ordinary text never turns into one:
"<|user|>" in a document is seven ordinary characters.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.data.chat_template import Part, chat_parts
from moe.data.unicode_text import WHITE_SPACE, require_text
from moe.errors import DataError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>",
    "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>",
    "<|user|>",
)  # fmt: skip
PHI_VOCAB_SIZE, PHI_NUM_PIECES = 32_064, 32_000
UNKNOWN, BOS = "<unk>", "<s>"
SPACE_MARK = "\u2581"  # stands for a space inside pieces, so it must not reach the model as text
SEGMENT_CHARACTERS = 65_536
# published tokenizers have rstrip set on these
SWALLOWING = frozenset(SPECIAL_TOKENS) - {"<|endoftext|>"}
_SPECIAL_PATTERN = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
_CUT_PATTERN = re.compile(r"[^ ](?= )")
# protobuf joins concatenated messages field by field, and the last value wins: this is
# ModelProto.normalizer_spec (field 3) with add_dummy_prefix (field 3) set to false
_WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def num_pieces_for(vocab_size: int) -> int:
    """SentencePiece pieces of a vocabulary trained here: all rows but the 11 special tokens.

    32064 is the exception: it gets Phi's 32000, so that the special tokens have Phi's ids.
    """
    if vocab_size == PHI_VOCAB_SIZE:
        return PHI_NUM_PIECES
    return vocab_size - len(SPECIAL_TOKENS)


class Tokenizer:
    """A loaded tokenizer.model; immutable, and pickled as its path for worker processes."""

    def __init__(self, model_path: str | Path, *, vocab_size: int | None) -> None:
        self._path = Path(model_path).absolute()
        model = _read_model(self._path)
        self.sha256 = hashlib.sha256(model).hexdigest()
        # a space that decoding drops is put before each text, as with Llama-2's pieces
        self.adds_prefix_space = _starts_with_space(_processor(model, self._path), "a")
        self._processor = _processor(model + _WITHOUT_DUMMY_PREFIX, self._path)
        self.num_pieces: int = self._processor.get_piece_size()
        _check_model(self._processor, self._path)
        self._byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.special_ids = {
            token: self.num_pieces + place for place, token in enumerate(SPECIAL_TOKENS)
        }
        needed = self.num_pieces + len(SPECIAL_TOKENS)
        self.vocab_size = vocab_size if vocab_size is not None else -(-needed // 64) * 64
        if self.vocab_size < needed:
            raise DataError(
                f"tokenizer.vocab_size: got {vocab_size}; {model_path} has {self.num_pieces} "
                f"pieces, and {len(SPECIAL_TOKENS)} special tokens follow. Use {needed} or more."
            )

    @classmethod
    def load(cls, model_path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Load a SentencePiece file; vocab_size defaults to the next multiple of 64.

        Raises DataError naming the file if it is missing, empty, damaged, has no byte fallback,
        changes text (normalisation), or does not have <unk>, <s>, </s> as its ids 0, 1, 2.
        """
        return cls(model_path, vocab_size=vocab_size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reload, (str(self._path), self.vocab_size)

    @property
    def bos_id(self) -> int:
        """<s>, the first token of every stored document."""
        return 1

    @property
    def end_of_text_id(self) -> int:
        return self.special_ids["<|endoftext|>"]

    @property
    def pad_id(self) -> int:
        """Padding is the end of text, as in Phi; batches mark it by document -1."""
        return self.end_of_text_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Generation ends on any of these (Phi: 32000, 32001, 32007)."""
        return tuple(self.special_ids[t] for t in ("<|endoftext|>", "<|assistant|>", "<|end|>"))

    @property
    def masked_ids(self) -> tuple[int, ...]:
        """For ModelConfig.masked_tokens: none here; the published models predict every id."""
        return ()

    def model_bytes(self) -> bytes:
        """The file; raises DataError if it was changed after it was loaded."""
        model = _read_model(self._path)
        if hashlib.sha256(model).hexdigest() != self.sha256:
            raise DataError(f"{self._path}: was changed after it was loaded; try again.")
        return model

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of text, without <s> or <|endoftext|>; decode gives exactly this text back.

        With allow_special, written special tokens such as <|user|> become their ids. With
        Llama-2's pieces they then swallow the whitespace after them, all but <|endoftext|>,
        because the published tokenizers have rstrip set. Raises DataError for text with half a
        surrogate pair, which has no UTF-8 form.
        """
        if not allow_special:
            return self._encode_text(text)
        return self._encode_parts(_special_parts(text))

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of ids; <s>, </s> and the special tokens are left out unless kept.

        Bytes that are not UTF-8 become U+FFFD. Unused rows decode to nothing.
        """
        return "".join(self.decode_stream(ids, keep_special=keep_special, starts_text=True))

    def decode_stream(
        self, ids: Iterable[int], *, keep_special: bool = False, starts_text: bool = False
    ) -> Iterator[str]:
        """Yield the text that each id completes, "" while a character is half done.

        starts_text drops the space that Llama-2's model puts before a text; it is wrong for
        ids that go on from a prompt. One more item comes after the last id.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        names = {number: token for token, number in self.special_ids.items()}
        at_start = starts_text and self.adds_prefix_space
        for number in ids:
            if number in names:
                text = decoder.decode(b"", final=True) + (names[number] if keep_special else "")
                at_start = starts_text and self.adds_prefix_space
                yield text
                continue
            piece = self._piece_bytes[number] if 0 <= number < self.num_pieces else b""
            if number in (0, 1, 2):
                piece = self._processor.id_to_piece(number).encode() if keep_special else b""
            elif at_start:
                piece, at_start = piece.removeprefix(b" "), False
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str = "phi35",
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation in a template of moe/data/chat_template.py.

        Special tokens written inside a content stay ordinary text. Raises DataError for a bad
        message or another template.
        """
        parts = chat_parts(messages, template=template, add_generation_prompt=add_generation_prompt)
        return self._encode_parts(parts)

    def _encode_parts(self, parts: Iterable[Part]) -> list[int]:
        ids: list[int] = []
        previous = ""
        for part in parts:
            if part.is_special:
                ids.append(self.bos_id if part.text == BOS else self.special_ids[part.text])
            else:
                swallows = self.adds_prefix_space and previous in SWALLOWING
                ids += self._encode_text(part.text.lstrip(WHITE_SPACE) if swallows else part.text)
            previous = part.text if part.is_special else ""
        return ids

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        require_text(text)
        if self.adds_prefix_space:
            text = " " + text
        ids: list[int] = []
        for place, part in enumerate(text.split(SPACE_MARK)):
            if place:
                ids += [self._byte_ids[byte] for byte in SPACE_MARK.encode()]
            for segment in _segments(part):
                ids += self._processor.encode(segment)
        return ids

    @functools.cached_property
    def _piece_bytes(self) -> list[bytes]:
        pieces = [self._processor.id_to_piece(number) for number in range(self.num_pieces)]
        table = [piece.replace(SPACE_MARK, " ").encode() for piece in pieces]
        for byte, number in enumerate(self._byte_ids):
            table[number] = bytes([byte])
        return table


def _reload(model_path: str, vocab_size: int) -> Tokenizer:
    return Tokenizer.load(model_path, vocab_size=vocab_size)


def _special_parts(text: str) -> Iterator[Part]:
    start = 0
    for match in _SPECIAL_PATTERN.finditer(text):
        yield Part(text[start : match.start()], False)
        yield Part(match.group(), True)
        start = match.end()
    yield Part(text[start:], False)


def _segments(text: str) -> Iterator[str]:
    """Cut long text before a space that follows another character.

    No piece reaches over that place (a space only begins a piece), so the ids do not change, and
    the memory of the encoder stays small for documents of any length.
    """
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        match = _CUT_PATTERN.search(text, start + SEGMENT_CHARACTERS - 1)
        if match is None:
            break
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def _read_model(path: Path) -> bytes:
    try:
        model = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); it must be a SentencePiece "
            "tokenizer.model. Set tokenizer.model_path, or leave it null to train one."
        ) from None
    if not model:
        raise DataError(f"{path}: is empty; it must be a SentencePiece tokenizer.model.")
    return model


def _processor(model: bytes, path: Path) -> SentencePieceProcessor:
    try:
        from sentencepiece import SentencePieceProcessor
    except ModuleNotFoundError:
        raise DataError(
            "the package sentencepiece is not installed; text cannot be tokenised without it. "
            "Install it with: pip install sentencepiece"
        ) from None
    processor = SentencePieceProcessor()
    try:
        # LoadFromSerializedProto reports garbage by exception and writes nothing to the terminal
        processor.LoadFromSerializedProto(model)
    except RuntimeError:
        raise DataError(
            f"{path}: is not a SentencePiece model, or it is damaged; copy it again, or leave "
            "tokenizer.model_path null to train one."
        ) from None
    return processor


def _starts_with_space(processor: SentencePieceProcessor, text: str) -> bool:
    pieces = processor.encode(text, out_type=str)
    return bool(pieces) and pieces[0].startswith(SPACE_MARK)


def _check_model(processor: SentencePieceProcessor, path: Path) -> None:
    first = [processor.id_to_piece(number) for number in range(min(3, processor.get_piece_size()))]
    if first != ["<unk>", "<s>", "</s>"]:
        raise DataError(f"{path}: its first pieces are {first}; they must be <unk>, <s>, </s>.")
    if any(not processor.is_byte(processor.piece_to_id(f"<0x{b:02X}>")) for b in range(256)):
        raise DataError(
            f"{path}: has no byte fallback, so some text would be lost; use a model trained with "
            "byte_fallback, such as Llama-2's, or leave tokenizer.model_path null to train one."
        )
    probe = "  Two  spaces\n\tand \u00bd \ufb01 \u00c5ngstrom "
    if processor.decode(processor.encode(probe)) != probe:
        raise DataError(
            f"{path}: changes text (its normalisation is not the identity), so documents could not "
            "be given back exactly. Use a model trained with normalization_rule_name=identity."
        )
