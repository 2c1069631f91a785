"""Phi-3-small's tokenizer: tiktoken with the cl100k pattern, a ranks file, and its special tokens.

The ids: the R ranks of the file (bytes and merges), then the 96 special tokens. With the 100256
ranks of cl100k_base the special tokens have their published ids 100256 to 100351, and the
vocabulary is 100352. With another ranks file they follow its last rank in the same order.

The original turns a written "<|end|>" into the special token wherever it stands in a text. Here
text never becomes a special token unless encode is told so (allow_special), because a document
or a user's message could otherwise end a turn or forge one.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.data.chat_template import chat_parts
from moe.data.ranks_file import Ranks, read_ranks
from moe.data.unicode_text import WHITE_SPACE, require_text
from moe.errors import DataError

if TYPE_CHECKING:
    from tiktoken import Encoding


def _dummies(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"<|dummy_id_{number}|>" for number in range(first, last + 1))


SPECIAL_TOKENS = (
    *_dummies(2, 2), "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|system|>", "<|user|>", "<|assistant|>", *_dummies(0, 1), "<|end|>", *_dummies(3, 11),
    "<|endofprompt|>", *_dummies(12, 86),
)  # fmt: skip
# never predicted: the dummies, and what only cl100k_base itself uses
_MASKED = re.compile(r"<\|(dummy_id_\d+|fim_(prefix|middle|suffix)|endofprompt)\|>")
_SPECIAL_PATTERN = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
# where cl100k_base cuts text into words before it merges
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
SEGMENT_CHARACTERS = 65_536
LONG_SPACE = 1000  # characters; tiktoken's matcher overflows its stack near a million
# no word of PATTERN reaches over these places, and none looks ahead over them
_CUT_PATTERN = re.compile(rf"(?<=[\r\n])(?=[^{WHITE_SPACE}])|(?<=[^{WHITE_SPACE}])(?= )")
_LONG_SPACE_PATTERN = re.compile(f"[{WHITE_SPACE}]{{{LONG_SPACE},}}")


class TiktokenTokenizer:
    """A loaded ranks file; immutable, and pickled as its path for worker processes."""

    adds_prefix_space = False

    def __init__(self, ranks_path: str | Path, *, vocab_size: int | None) -> None:
        self._path = Path(ranks_path).absolute()
        self._ranks = read_ranks(self._path)
        self.sha256 = self._ranks.sha256
        self._encoding = _encoding(self._ranks)
        self.num_pieces = len(self._ranks.tokens)
        self.special_ids = {
            token: self.num_pieces + place for place, token in enumerate(SPECIAL_TOKENS)
        }
        needed = self.num_pieces + len(SPECIAL_TOKENS)
        self.vocab_size = vocab_size if vocab_size is not None else -(-needed // 64) * 64
        if self.vocab_size < needed:
            raise DataError(
                f"tokenizer.vocab_size: got {vocab_size}; {ranks_path} has {self.num_pieces} "
                f"ranks, and {len(SPECIAL_TOKENS)} special tokens follow. Use {needed} or more."
            )

    @classmethod
    def load(cls, ranks_path: str | Path, *, vocab_size: int | None = None) -> TiktokenTokenizer:
        """Load a *.tiktoken file; vocab_size defaults to the next multiple of 64.

        Raises DataError naming the file and line if it is missing or damaged.
        """
        return cls(ranks_path, vocab_size=vocab_size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reload, (str(self._path), self.vocab_size)

    @property
    def bos_id(self) -> int:
        """<|endoftext|>: there is no other first token, and the published configuration says so."""
        return self.end_of_text_id

    @property
    def end_of_text_id(self) -> int:
        return self.special_ids["<|endoftext|>"]

    @property
    def pad_id(self) -> int:
        """Padding is the end of text, as published; batches mark it by document -1."""
        return self.end_of_text_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Generation ends on any of these (Phi-3-small: 100257, 100266)."""
        return tuple(self.special_ids[token] for token in ("<|endoftext|>", "<|end|>"))

    @property
    def masked_ids(self) -> tuple[int, ...]:
        """For ModelConfig.masked_tokens: ids that the published model never predicts."""
        return tuple(n for token, n in self.special_ids.items() if _MASKED.fullmatch(token))

    @property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each rank."""
        return self._ranks.tokens

    def model_bytes(self) -> bytes:
        """The ranks file, byte for byte."""
        return self._ranks.content()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of text, without <|endoftext|>; decode gives exactly this text back.

        With allow_special, written special tokens such as <|user|> become their ids, as the
        original always does. Raises DataError for text with half a surrogate pair.
        """
        if not allow_special:
            return self._encode_text(text)
        ids, start = [], 0
        for match in _SPECIAL_PATTERN.finditer(text):
            ids += self._encode_text(text[start : match.start()])
            ids.append(self.special_ids[match.group()])
            start = match.end()
        return ids + self._encode_text(text[start:])

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of ids; the special tokens are left out unless kept.

        Bytes that are not UTF-8 become U+FFFD. Unused rows decode to nothing.
        """
        return "".join(self.decode_stream(ids, keep_special=keep_special))

    def decode_stream(
        self, ids: Iterable[int], *, keep_special: bool = False, starts_text: bool = False
    ) -> Iterator[str]:
        """Yield the text that each id completes, "" while a character is half done.

        starts_text changes nothing: no space is put before a text. One more item comes after the
        last id.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        names = {number: token for token, number in self.special_ids.items()}
        for number in ids:
            if number in names:
                yield decoder.decode(b"", final=True) + (names[number] if keep_special else "")
            else:
                known = 0 <= number < self.num_pieces
                yield decoder.decode(self._ranks.tokens[number] if known else b"")
        yield decoder.decode(b"", final=True)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str = "phi35",
        add_generation_prompt: bool = True,
        continues_answer: bool = False,
    ) -> list[int]:
        """Ids of a conversation in a template of moe/data/chat_template.py (phi3_small's own).

        Special tokens written inside a content stay ordinary text. Raises DataError for a bad
        message, and for a template with a token that this vocabulary lacks.
        """
        ids: list[int] = []
        for part in chat_parts(
            messages, template=template, add_generation_prompt=add_generation_prompt,
            continues_answer=continues_answer,
        ):  # fmt: skip
            if not part.is_special:
                ids += self._encode_text(part.text)
            elif part.text in self.special_ids:
                ids.append(self.special_ids[part.text])
            else:
                raise DataError(
                    f"tokenizer.chat_template: got {template!r}, which writes {part.text}; "
                    f"{self._path} has no such token. Use tokenizer.chat_template=phi3_small."
                )
        return ids

    def _encode_text(self, text: str) -> list[int]:
        require_text(text)
        ids: list[int] = []
        for segment in _segments(text):
            ids += self._encoding.encode_ordinary(segment)
        return ids


def _reload(ranks_path: str, vocab_size: int) -> TiktokenTokenizer:
    return TiktokenTokenizer.load(ranks_path, vocab_size=vocab_size)


def _encoding(ranks: Ranks) -> Encoding:
    try:
        from tiktoken import Encoding
    except ModuleNotFoundError:
        raise DataError(
            "the package tiktoken is not installed; Phi-3-small's tokenizer needs it. "
            "Install it with: pip install tiktoken"
        ) from None
    # our own special tokens stay out of it: they are cut out of the text before, if at all
    return Encoding(
        ranks.path.name, pat_str=PATTERN, mergeable_ranks=ranks.rank_of(), special_tokens={}
    )


def _segments(text: str) -> Iterator[str]:
    """Cut long text where its ids do not change, so that the encoder's memory stays small."""
    for part in _without_long_space(text):
        start = 0
        while len(part) - start > SEGMENT_CHARACTERS:
            match = _CUT_PATTERN.search(part, start + SEGMENT_CHARACTERS)
            if match is None:
                break
            yield part[start : match.start()]
            start = match.start()
        if start < len(part):
            yield part[start:]


def _without_long_space(text: str) -> Iterator[str]:
    """Cut long runs of white space between their words.

    PATTERN makes a run that text follows into a word up to its last newline, a word of the rest
    but its last character, and that character, which can belong to the next word. At the end of
    a segment all three come out as the same words, without the search that overflows.
    """
    start = 0
    for match in _LONG_SPACE_PATTERN.finditer(text):
        if match.end() == len(text):
            break
        after_newline = max(match.group().rfind(end) for end in "\r\n") + 1 + match.start()
        for cut in (after_newline, match.end() - 1):
            if max(start, match.start()) < cut:
                yield text[start:cut]
                start = cut
    if start < len(text):
        yield text[start:]
