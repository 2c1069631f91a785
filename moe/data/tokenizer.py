"""Text to token ids and back: SentencePiece BPE with byte fallback, plus the Phi special tokens.

The ids: the model file's P pieces (<unk> 0, <s> 1, </s> 2, 256 bytes, merges), then the 11 special
tokens, then unused rows up to vocab_size. With the 32000 pieces of Llama-2 the special tokens
are exactly Phi's ids 32000 to 32010, and the vocabulary is 32064.

The special tokens live outside the SentencePiece model, so ordinary text never turns into one:
"<|user|>" in a document is ordinary characters.

The file may also be a tokenizer.json that says the same (moe/data/read_tokenizer_json.py). Then
its added tokens are the special ones, with the ids that it gives them, and what a fine-tune added
are words of the text.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.data.added_tokens import AddedToken, parts_between, pattern_of
from moe.data.chat_template import Part, chat_parts
from moe.data.read_tokenizer_json import looks_like_json, read_tokenizer_json
from moe.data.sentencepiece_model import SPACE_MARK, sentencepiece_model
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
_END_OF_TEXT, _STOPS = "<|endoftext|>", ("<|endoftext|>", "<|assistant|>", "<|end|>")
SEGMENT_CHARACTERS = 65_536
# published tokenizers have rstrip set on these
SWALLOWING = frozenset(SPECIAL_TOKENS) - {"<|endoftext|>"}
_CUT_PATTERN = re.compile(r"[^ ](?= )")
# protobuf joins concatenated messages field by field, and the last value wins: this is
# ModelProto.normalizer_spec (field 3) with add_dummy_prefix (field 3) set to false
_WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_PLAIN = AddedToken("", -1)


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
        content = _read_model(self._path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.is_json = looks_like_json(content)  # the file is a tokenizer.json
        model, added = _model_and_added(content, self._path)
        # a space that decoding drops is put before each text, as with Llama-2's pieces
        self.adds_prefix_space = _starts_with_space(_processor(model, self._path), "a")
        self._processor = _processor(model + _WITHOUT_DUMMY_PREFIX, self._path)
        _check_model(self._processor, self._path)
        self._num_rows: int = self._processor.get_piece_size()
        self._byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if added is None:
            added = tuple(
                AddedToken(
                    token,
                    self._num_rows + place,
                    strips_right=self.adds_prefix_space and token in SWALLOWING,
                )
                for place, token in enumerate(SPECIAL_TOKENS)
            )
        self._added = {token.content: token for token in added}
        words = [token for token in added if token.is_word]
        self._word_pattern, self._special_pattern = pattern_of(words), pattern_of(added)
        self.special_ids = {token.content: token.id for token in added}
        self.num_pieces: int = max([self._num_rows, *(word.id + 1 for word in words)])
        needed = max([self.num_pieces, *(token.id + 1 for token in added)])
        self.vocab_size = vocab_size if vocab_size is not None else -(-needed // 64) * 64
        if self.vocab_size < needed:
            raise DataError(
                f"tokenizer.vocab_size: got {vocab_size}; {model_path} has {self._num_rows} "
                f"pieces, and {len(added)} special tokens follow. Use {needed} or more."
            )

    @classmethod
    def load(cls, model_path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Load a SentencePiece file or a tokenizer.json; vocab_size defaults to the next multiple
        of 64.

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
        return self.special_ids[_END_OF_TEXT]

    @property
    def pad_id(self) -> int:
        """Padding is the end of text, as in Phi; batches mark it by document -1."""
        return self.end_of_text_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Generation ends on any of these (Phi: 32000, 32001, 32007)."""
        return tuple(self.special_ids[token] for token in _STOPS if token in self.special_ids)

    @property
    def masked_ids(self) -> tuple[int, ...]:
        """For ModelConfig.masked_tokens: none here; the published models predict every id."""
        return ()

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """The special tokens, words of a fine-tune among them, in the order of the file."""
        return tuple(self._added.values())

    def model_bytes(self) -> bytes:
        """The file; raises DataError if it was changed after it was loaded."""
        model = _read_model(self._path)
        if hashlib.sha256(model).hexdigest() != self.sha256:
            raise DataError(f"{self._path}: was changed after it was loaded; try again.")
        return model

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of text, without <s> or <|endoftext|>; decode gives exactly this text back.

        A word that a fine-tune added is its id, and swallows white space where its file says so.
        With allow_special, written special tokens such as <|user|> become their ids. With
        Llama-2's pieces they then swallow the whitespace after them, all but <|endoftext|>,
        because the published tokenizers have rstrip set. Raises DataError for text with half a
        surrogate pair, which has no UTF-8 form.
        """
        pattern = self._special_pattern if allow_special else None
        return self._encode_parts(parts_between(text, pattern))

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
        names = {token.id: token for token in self._added.values()}
        at_start = starts_text and self.adds_prefix_space
        for number in ids:
            if number in names:
                is_shown = keep_special or names[number].is_word
                text = decoder.decode(b"", final=True) + (names[number].content * is_shown)
                at_start = starts_text and self.adds_prefix_space
                yield text
                continue
            piece = self._piece_bytes[number] if 0 <= number < self._num_rows else b""
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
        continues_answer: bool = False,
    ) -> list[int]:
        """Ids of a conversation in a template of moe/data/chat_template.py.

        Special tokens written inside a content stay ordinary text; the rest is as in chat_parts.
        Raises DataError for a bad message or another template.
        """
        parts = chat_parts(
            messages, template=template, add_generation_prompt=add_generation_prompt,
            continues_answer=continues_answer,
        )  # fmt: skip
        return self._encode_parts(parts)

    def _encode_parts(self, parts: Iterable[Part]) -> list[int]:
        ids: list[int] = []
        given: list[Part] = []
        for part in parts:
            given += (part,) if part.is_special else parts_between(part.text, self._word_pattern)
        for place, part in enumerate(given):
            if part.is_special:
                ids.append(self.bos_id if part.text == BOS else self._special_id(part.text))
                continue
            text = part.text
            if place and self._token(given[place - 1]).strips_right:
                text = text.lstrip(WHITE_SPACE)
            if place + 1 < len(given) and self._token(given[place + 1]).strips_left:
                text = text.rstrip(WHITE_SPACE)
            ids += self._encode_text(text)
        return ids

    def _token(self, part: Part) -> AddedToken:
        return self._added.get(part.text, _PLAIN) if part.is_special else _PLAIN

    def _special_id(self, content: str) -> int:
        if content not in self.special_ids:
            raise DataError(
                f"tokenizer.chat_template: it writes {content}, and {self._path} has no such "
                "token. Use a template whose tokens it has, or text without a template."
            )
        return self.special_ids[content]

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

    @property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each piece; of <unk>, <s> and </s> their names."""
        return self._piece_bytes

    @functools.cached_property
    def _piece_bytes(self) -> tuple[bytes, ...]:
        pieces = [self._processor.id_to_piece(number) for number in range(self._num_rows)]
        table = [piece.replace(SPACE_MARK, " ").encode() for piece in pieces]
        for byte, number in enumerate(self._byte_ids):
            table[number] = bytes([byte])
        return tuple(table)


def _reload(model_path: str, vocab_size: int) -> Tokenizer:
    return Tokenizer.load(model_path, vocab_size=vocab_size)


def _model_and_added(content: bytes, path: Path) -> tuple[bytes, tuple[AddedToken, ...] | None]:
    """A serialised SentencePiece model, and the tokens beside its pieces where the file says."""
    if not looks_like_json(content):
        return content, None
    control = frozenset((*SPECIAL_TOKENS, UNKNOWN, BOS, "</s>"))
    found = read_tokenizer_json(content, where=path, control=control)
    if _END_OF_TEXT not in {token.content for token in found.added}:
        raise DataError(
            f"{path}: has no token {_END_OF_TEXT}, which ends every text here. Use a tokenizer of "
            "the Phi-3 family."
        )
    model = sentencepiece_model(
        found.pieces,
        rank_of=found.rank_of,
        control={token.id for token in found.added},
        adds_prefix_space=found.adds_prefix_space,
    )
    return model, found.added


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
