"""In which order an epoch reads a split: documents shuffled, whole or by blocks, as streams.

Up to MOST_WHOLE documents, an epoch is one block: all documents, shuffled. Of a longer table no
rank could hold the order. So the stored stream is cut into segments of 16 windows, and a block is
16 segments from anywhere, drawn by a keyed permutation, whose pieces of documents are shuffled.
Each block is found by itself, in the time and memory of its 256 windows, however many documents
there are. A document is cut where a segment ends, as at the end of every window; segments overlap
by one token, so nothing is lost by it.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from moe.data.document_table import documents_at, table_error
from moe.data.packing import Stream, make_stream
from moe.data.permutation import order_of, permuted, random_key, random_words, shuffled
from moe.data.shards import TokenSplit

MOST_WHOLE = 2**20  # documents
SEGMENT_WINDOWS = 16  # more: fewer cuts; fewer: less of a document's neighbourhood in a block
BLOCK_SEGMENTS = 16  # more: better mixed, longer to find
_BLOCK_WINDOWS = BLOCK_SEGMENTS * SEGMENT_WINDOWS
_BLOCK_ORDER = "order in blocks, 1"  # another text where a change gives other rows


@dataclass(frozen=True)
class EpochOrder:
    """How the rows of one split fall into blocks; the same for every seed and epoch."""

    split: TokenSplit
    seq_len: int
    segment_tokens: int  # 0 where the whole epoch is one block

    @property
    def num_segments(self) -> int:
        """Full segments; one shorter is left over at the end of the stored stream."""
        if not self.segment_tokens:
            return 0
        return (self.split.num_tokens - 1) // (self.segment_tokens - 1)

    @property
    def num_blocks(self) -> int:
        """The last one has fewer segments, or the one that is left over as well."""
        return max(1, -(-(self.num_segments + self._has_rest) // BLOCK_SEGMENTS))

    @property
    def num_windows(self) -> int:
        """Rows of an epoch; up to seq_len - 1 tokens at the end of its last block are in none."""
        if not self.segment_tokens:
            return (self.split.num_tokens - 1) // self.seq_len
        full = self.num_blocks - 1
        segments = self.num_segments - full * BLOCK_SEGMENTS
        rest = self.split.num_tokens - self._rest_from if self._has_rest else 0
        # a window may end with its block, where no document goes on and so no label is missing
        return full * _BLOCK_WINDOWS + (segments * self.segment_tokens + rest) // self.seq_len

    def place(self, window_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of windows of 0 to num_windows - 1, and their numbers there, (W,) each."""
        if not self.segment_tokens:
            return np.zeros_like(window_W), window_W
        block_W = np.minimum(window_W // _BLOCK_WINDOWS, self.num_blocks - 1)
        return block_W, window_W - block_W * _BLOCK_WINDOWS

    def streams(self, block_B: np.ndarray, *, seed: int, epoch: int) -> list[Stream]:
        """The tokens of each of these blocks, (B,), in this epoch's order."""
        if not self.segment_tokens:
            key = random_key(seed, "documents", epoch)
            whole = make_stream(self.split, shuffled(self.split.num_documents, key=key))
            return [whole] * len(block_B)
        start_S, stop_S, num_B = self._segments(block_B, key=random_key(seed, "segments", epoch))
        return self._pieces(start_S, stop_S, num_B, key=random_key(seed, "pieces", epoch))

    @property
    def _rest_from(self) -> int:
        """Where the segment that is shorter begins, which stands in the last block."""
        return self.num_segments * (self.segment_tokens - 1)

    @property
    def _has_rest(self) -> bool:
        return self.split.num_tokens - self._rest_from > 1

    def _segments(
        self, block_B: np.ndarray, *, key: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where segments begin and end in the stored stream, (S,); how many each block has."""
        number = block_B[:, None] * BLOCK_SEGMENTS + np.arange(BLOCK_SEGMENTS)
        # segment number num_segments is the rest
        is_there = number < self.num_segments + self._has_rest
        number_S = number[is_there]
        full = number_S < self.num_segments
        number_S[full] = permuted(number_S[full], size=self.num_segments, key=key)
        start_S = number_S * (self.segment_tokens - 1)
        stop_S = np.minimum(start_S + self.segment_tokens, self.split.num_tokens)
        return start_S, stop_S, is_there.sum(axis=1)

    def _pieces(
        self, start_S: np.ndarray, stop_S: np.ndarray, num_B: np.ndarray, *, key: int
    ) -> list[Stream]:
        """The streams of the documents' parts in these segments, shuffled block by block."""
        split, places = self.split, self.split.places
        ends = np.concatenate([start_S, stop_S - 1])
        first_S, last_S = documents_at(split.documents, ends, places=places).reshape(2, -1)
        num_S = last_S - first_S + 1
        before_S = np.cumsum(num_S) - num_S
        document_P = np.arange(int(num_S.sum())) + np.repeat(first_S - before_S, num_S)
        rows = split.documents.take(document_P)
        shard_P = np.minimum(rows["shard"], len(split.shards) - 1)
        tokens_P, offset_P = rows["tokens"].astype(np.int64), rows["offset"].astype(np.int64)
        begin_P = places.token_N[shard_P] + offset_P
        from_P = np.maximum(np.repeat(start_S, num_S) - begin_P, 0)
        to_P = np.minimum(np.repeat(stop_S, num_S) - begin_P, tokens_P)
        length_P = to_P - from_P
        # the table is checked row by row only where the data are verified
        if (
            int(length_P.min()) <= 0
            or bool((begin_P + to_P > places.token_N[shard_P + 1]).any())
            or int(length_P.sum()) != int((stop_S - start_S).sum())
            or int(rows["domain"].max()) >= len(split.domains)
        ):
            raise table_error(split.table_path)
        edges = np.cumsum(num_S)[np.cumsum(num_B) - 1].tolist()
        # the same document has another word in each of the segments that share it
        word_P = random_words(document_P * 2 + (from_P > 0), key=key)
        streams = []
        for first, stop in itertools.pairwise([0, *edges]):
            order = first + order_of(word_P[first:stop])
            ends_P = np.cumsum(length_P[order])
            streams.append(Stream(split, document_P[order], to_P[order], ends_P))
        return streams


def epoch_order(split: TokenSplit, *, seq_len: int) -> EpochOrder:
    """How rows of seq_len tokens of this split are ordered."""
    in_blocks = split.num_documents > MOST_WHOLE
    return EpochOrder(split, seq_len, SEGMENT_WINDOWS * seq_len if in_blocks else 0)


def stream_fingerprint(split: TokenSplit) -> str:
    """SHA-256 of what decides the rows of a run besides its configuration.

    That is the data's fingerprint where all documents are shuffled as a whole, and it and the name
    of the order where they are read in blocks: a run trained in another order does not go on.
    """
    fingerprint = split.manifest.fingerprint
    if split.num_documents <= MOST_WHOLE:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {_BLOCK_ORDER}".encode()).hexdigest()
