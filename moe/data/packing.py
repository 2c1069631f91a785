"""How documents become rows of a batch: one stream, cut into windows that overlap by one token.

Window w of seq_len S holds tokens w*S to w*S + S of the stream: S inputs, and their targets one
token later. So every token but the stream's first is a target once; the target of a document's
last token would be the next document's <s>, which nobody predicts, and its label is -100.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from moe.data.shards import TokenSplit

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows for the model; int64 tensors, (B, S) but for sample.

    A token may attend to the tokens before it with the same document number in its row. Padding
    is document -1 (and domain -1, label -100, position 0).
    """

    tokens: torch.Tensor
    labels: torch.Tensor  # the next token of the same document, or -100
    position: torch.Tensor  # 0 at the start of the window and of each document
    document: torch.Tensor  # 0, 1, 2, ... inside the window
    domain: torch.Tensor  # index into TokenSplit.domains, of the token's and its label's document
    sample: torch.Tensor  # (B,) number of the row in its run or evaluation; -1 for a padded row

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in fields(self)
        }
        return Batch(**moved)


@dataclass(frozen=True)
class Stream:
    """Documents of a split one after another, in some order; nothing is copied."""

    split: TokenSplit
    order_D: np.ndarray  # document numbers
    end_D: np.ndarray  # where each of them ends in the stream, in tokens

    @property
    def num_tokens(self) -> int:
        return int(self.end_D[-1]) if len(self.end_D) else 0

    def num_windows(self, seq_len: int) -> int:
        """Full windows; up to seq_len - 1 tokens at the end are left over."""
        return max(0, (self.num_tokens - 1) // seq_len)


def make_stream(split: TokenSplit, order_D: np.ndarray) -> Stream:
    """The stream of these documents of the split, (D,) int64, in this order."""
    end_D = np.cumsum(split.documents["tokens"][order_D].astype(np.int64))
    return Stream(split, order_D, end_D)


def pack(stream: Stream, windows: np.ndarray, *, seq_len: int, sample: np.ndarray) -> Batch:
    """The rows of these windows, (B,) each; a window past the end is padding, whole or in part."""
    num_rows = len(windows)
    shape = (num_rows, seq_len + 1)
    tokens = np.full(shape, stream.split.manifest.end_of_text_id, dtype=np.int64)
    document = np.full(shape, -1, dtype=np.int64)
    domain = np.full(shape, -1, dtype=np.int64)
    position = np.zeros(shape, dtype=np.int64)
    for row, window in enumerate(windows.tolist()):
        _fill_row(
            stream, window * seq_len,
            tokens=tokens[row], document=document[row], domain=domain[row], position=position[row],
        )  # fmt: skip
    same = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    labels = np.where(same, tokens[:, 1:], IGNORED)
    return Batch(
        tokens=_tensor(tokens[:, :-1]),
        labels=_tensor(labels),
        position=_tensor(position[:, :-1]),
        document=_tensor(document[:, :-1]),
        domain=_tensor(domain[:, :-1]),
        sample=_tensor(sample.astype(np.int64)),
    )


def _fill_row(
    stream: Stream, start: int, *, tokens: np.ndarray, document: np.ndarray, domain: np.ndarray,
    position: np.ndarray,
) -> None:  # fmt: skip
    """Copy the stream from start into the row's arrays, (S+1,) each, until they are full."""
    split, end_D = stream.split, stream.end_D
    place = int(np.searchsorted(end_D, start, side="right"))
    filled = number = 0
    while filled < len(tokens) and place < len(end_D):
        source = int(stream.order_D[place])
        left = int(end_D[place]) - (start + filled)
        take = min(left, len(tokens) - filled)
        ids = split.tokens(source)
        part = slice(filled, filled + take)
        tokens[part] = ids[len(ids) - left : len(ids) - left + take]
        document[part] = number
        domain[part] = split.documents["domain"][source]
        position[part] = np.arange(take)
        filled, place, number = filled + take, place + 1, number + 1


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
