"""Which tokenizer a file holds, decided by its content: SentencePiece, tiktoken ranks or JSON.

A prepared folder and a checkpoint name any of these files tokenizer.model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from moe.data.ranks_file import looks_like_ranks
from moe.data.read_tokenizer_json import looks_like_json
from moe.data.tiktoken_tokenizer import TiktokenTokenizer
from moe.data.tokenizer import Tokenizer
from moe.errors import DataError

_EITHER = (
    "a SentencePiece tokenizer.model, a tokenizer.json of that kind or a tiktoken ranks file "
    "(*.tiktoken)"
)


class TextTokenizer(Protocol):
    """What both tokenizers are; the classes say more about each member."""

    sha256: str
    vocab_size: int  # rows that a model needs
    num_pieces: int  # ids of ordinary text are below it
    special_ids: dict[str, int]
    adds_prefix_space: bool

    @property
    def token_bytes(self) -> tuple[bytes, ...]: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def end_of_text_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def masked_ids(self) -> tuple[int, ...]: ...
    def model_bytes(self) -> bytes: ...
    def encode(self, text: str, *, allow_special: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str: ...
    def decode_stream(
        self, ids: Iterable[int], *, keep_special: bool = False, starts_text: bool = False
    ) -> Iterator[str]: ...
    def chat_ids(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str = "phi35",
        add_generation_prompt: bool = True,
        continues_answer: bool = False,
    ) -> list[int]: ...


def load_tokenizer(path: str | Path, *, vocab_size: int | None = None) -> TextTokenizer:
    """Load any kind of file; vocab_size defaults to the next multiple of 64.

    Raises DataError naming the file if it is missing, empty, of no kind, or damaged, or if
    vocab_size is too small for it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); it must be {_EITHER}. "
            "Set tokenizer.model_path, or leave it null to train one."
        ) from None
    if looks_like_ranks(start):
        return TiktokenTokenizer.load(path, vocab_size=vocab_size)
    # the first field of a SentencePiece file is a piece; text never begins with a line feed here
    if start.startswith(b"\n") or looks_like_json(start):
        return Tokenizer.load(path, vocab_size=vocab_size)
    what = "is empty" if not start else f"begins with {start[:16]!r}"
    if start.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not the file (git lfs pull fetches it)"
    raise DataError(
        f"{path}: {what}; it must be {_EITHER}. Set tokenizer.model_path to one, or leave it null "
        "to train one."
    )


def reads_ids_of(reader: TextTokenizer, writer: TextTokenizer) -> bool:
    """Whether the writer's ids mean the same text to the reader, whatever files they are from.

    The reader may have words besides, as a fine-tune adds them.
    """
    return (
        type(reader) is type(writer)
        and reader.adds_prefix_space == writer.adds_prefix_space
        and reader.token_bytes == writer.token_bytes
        and reader.special_ids.items() >= writer.special_ids.items()
    )
