"""A part of the sources to token ids: a file of ids for each split, a row for each document."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from moe.data.building import keep_json, kept_file, key_of, read_json
from moe.data.load_tokenizer import TextTokenizer, load_tokenizer
from moe.data.manifest import SPLITS, file_entry
from moe.data.survey import ROWS_AT_ONCE, Surveyed, chosen_texts
from moe.data.text_pieces import cut_end
from moe.errors import DataError

ROW_DTYPE = np.dtype(
    [("tokens", "<u8"), ("bytes", "<u8"), ("domain", "<u2"), ("split", "u1")]  # of SPLITS
)


@dataclass(frozen=True)
class TokeniseTask:
    """A part, which of its documents are wanted, and how their text becomes ids."""

    part: Surveyed
    kept: bytes  # a bit for each document
    validation: bytes
    end_fraction: float  # above 0: the end of each document is the validation text
    domain_numbers: tuple[int, ...]  # of the part's names
    tokenizer_path: Path
    tokenizer_sha256: str
    vocab_size: int
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the sources, about."""
        return self.part.task.num_bytes

    @property
    def is_kept(self) -> bool:
        """Whether tokenise_part has done it."""
        return self.path.with_suffix(".json").exists()

    @property
    def key(self) -> str:
        """The hash of all that the result depends on."""
        return key_of(
            self.part.task.stem, self.kept.hex(), self.validation.hex(), self.end_fraction,
            self.domain_numbers, self.tokenizer_sha256, self.vocab_size, self.dtype,
        )  # fmt: skip

    @property
    def path(self) -> Path:
        """Where the result is, less its suffix: .rows, .json and the splits' names."""
        return self.part.task.folder / f"tokens-{self.key}"

    @property
    def sample_path(self) -> Path:
        """Where sample_part keeps the texts."""
        return self.part.task.folder / f"sample-{self.key}.json"

    @property
    def rows(self) -> np.ndarray:
        """(documents,) of ROW_DTYPE."""
        return np.fromfile(self.path.with_suffix(".rows"), dtype=ROW_DTYPE)


def packed(member_D: np.ndarray) -> bytes:
    """A bit for each document."""
    return np.packbits(member_D).tobytes()


def sample_part(task: TokeniseTask) -> None:
    """Keep the texts of a part that the tokenizer is trained on, as a list of JSON."""
    texts = [
        cut_end(text, fraction=task.end_fraction)[0] if task.end_fraction else text
        for _, text in chosen_texts(task.part, _bits(task, task.kept), on_change=_changed)
    ]
    keep_json(task.sample_path, texts)


def read_sample(task: TokeniseTask) -> list[str]:
    """What sample_part kept."""
    return read_json(task.sample_path)


def tokenise_part(task: TokeniseTask) -> None:
    """Keep the ids of a part's documents: <s>, the text's and <|endoftext|> one after another."""
    tokenizer = _loaded_once(task.tokenizer_path, task.tokenizer_sha256, task.vocab_size)
    kept_D, validation_D = _bits(task, task.kept), _bits(task, task.validation)
    item = np.dtype(task.dtype).newbyteorder("<")
    domains = task.part.rows["domain"]
    rows: list[tuple[int, int, int, int]] = []
    with (
        kept_file(task.path.with_suffix(f".{SPLITS[0]}")) as train,
        kept_file(task.path.with_suffix(f".{SPLITS[1]}")) as validation,
        kept_file(task.path.with_suffix(".rows")) as table,
    ):
        for place, text in chosen_texts(task.part, kept_D, on_change=_changed):
            texts = [(text, int(validation_D[place]))]
            if task.end_fraction:
                start, end = cut_end(text, fraction=task.end_fraction)
                texts = [(start, 0)] + ([(end, 1)] if end else [])
            for piece, split in texts:
                ids = np.array(
                    [tokenizer.bos_id, *tokenizer.encode(piece), tokenizer.end_of_text_id],
                    dtype=item,
                )
                (validation if split else train).write(ids.tobytes())
                domain = task.domain_numbers[domains[place]]
                rows.append((len(ids), len(piece.encode()), domain, split))
            if len(rows) >= ROWS_AT_ONCE:
                table.write(np.array(rows, dtype=ROW_DTYPE).tobytes())
                rows = []
        table.write(np.array(rows, dtype=ROW_DTYPE).tobytes())
    keep_json(task.path.with_suffix(".json"), True)


def _bits(task: TokeniseTask, bits: bytes) -> np.ndarray:
    unpacked = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=task.part.num_documents)
    return unpacked.astype(bool)


def _changed() -> NoReturn:
    raise DataError(
        "data.sources: a file was changed while it was prepared; start again when nothing writes "
        "to the sources."
    )


# reading cl100k's 100256 ranks takes 0.2 s, as long as encoding a MiB
@functools.lru_cache(maxsize=1)
def _loaded_once(path: Path, sha256: str, vocab_size: int) -> TextTokenizer:
    if file_entry(path).sha256 != sha256:
        raise DataError(f"{path}: was changed while text was tokenised; start again.")
    return load_tokenizer(path, vocab_size=vocab_size)
