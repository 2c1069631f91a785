"""How documents become rows of a batch: one stream, cut into windows that overlap by one token.

Window w of seq_len S holds tokens w*S to w*S + S of the stream: S inputs, and their targets one
token later. So every token but the stream's first is a target once; the target of a document's
last token would be the next document's <s>, which nobody predicts, and its label is -100.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Pieces of a split's documents one after another, in some order; no token is copied."""

    split: TokenSplit
    document_P: np.ndarray  # document numbers
    stop_P: np.ndarray  # where each piece ends in its document, in tokens
    end_P: np.ndarray  # where it ends in the stream

    @property
    def num_tokens(self) -> int:
        return int(self.end_P[-1]) if len(self.end_P) else 0


def make_stream(split: TokenSplit, order_D: np.ndarray) -> Stream:
    """The stream of these whole documents of the split, (D,) int64, in this order."""
    tokens_D = split.documents["tokens"][order_D].astype(np.int64)
    return Stream(split, order_D, tokens_D, np.cumsum(tokens_D))


def pack(
    streams: Sequence[Stream], windows: np.ndarray, *, seq_len: int, sample: np.ndarray
) -> Batch:
    """The row of each window in its stream, (B,) each; past the end is padding."""
    shape = (len(streams), seq_len + 1)
    tokens = np.full(shape, streams[0].split.manifest.end_of_text_id, dtype=np.int64)
    document = np.full(shape, -1, dtype=np.int64)
    domain = np.full(shape, -1, dtype=np.int64)
    position = np.zeros(shape, dtype=np.int64)
    for row, (stream, window) in enumerate(zip(streams, windows.tolist(), strict=True)):
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
    split, end_P = stream.split, stream.end_P
    first = int(np.searchsorted(end_P, start, side="right"))
    last = int(np.searchsorted(end_P, start + len(tokens), side="left"))
    pieces = slice(first, last + 1)
    rows = split.documents[stream.document_P[pieces]]
    end = np.minimum(end_P[pieces] - start, len(tokens))
    begin = np.concatenate([[0], end])[:-1]
    # the document's token that stands at the row's place 0, were the document as long as that
    origin = rows["offset"].astype(np.int64) + stream.stop_P[pieces] - (end_P[pieces] - start)
    shards = rows["shard"].tolist()
    place = zip(shards, begin.tolist(), end.tolist(), origin.tolist(), strict=True)
    for shard, a, b, at in place:
        tokens[a:b] = split.shards[shard][at + a : at + b]
    length = end - begin
    filled = int(end[-1]) if len(end) else 0
    document[:filled] = np.repeat(np.arange(len(end)), length)
    domain[:filled] = np.repeat(rows["domain"].astype(np.int64), length)
    position[:filled] = np.arange(filled) - np.repeat(begin, length)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
