"""Which rows a training step or an evaluation reads, for each rank and micro-batch.

Row i of step s is a pure function of (seed, s, i): sample g = s * batch_size + i is window
permuted(g mod W) of epoch g // W, whose documents are shuffled by (seed, epoch), as a whole or in
blocks (epoch_order). Ranks, micro-batches and reader processes only divide the rows among
themselves. Within an epoch every token but the <s> of each document is predicted exactly once,
apart from the up to seq_len - 1 tokens at the end of its last stream that do not fill a window.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moe.data.epoch_order import epoch_order
from moe.data.packing import Batch, Stream, make_stream, pack
from moe.data.permutation import permuted, random_key
from moe.data.shards import TokenSplit
from moe.errors import ConfigError, DataError

_SHARED_MEMORY = Path("/dev/shm")  # where torch's readers put their batches on Linux
_AHEAD, _TENSORS = 2, 5  # steps that a reader is ahead; tensors of 8 bytes a token in a batch


class TrainingRows:
    """Rows of a run's steps: a pure function that keeps the last epochs which are one stream."""

    def __init__(self, split: TokenSplit, *, seed: int, seq_len: int, batch_size: int) -> None:
        self._arguments = {"seed": seed, "seq_len": seq_len, "batch_size": batch_size}
        self.split, self.seed, self.seq_len, self.batch_size = split, seed, seq_len, batch_size
        self._order = epoch_order(split, seq_len=seq_len)
        self.num_windows = self._order.num_windows
        if self.num_windows < 1:
            raise DataError(
                f"data.seq_len: got {seq_len}; the {split.name} split of {split.data_dir} has "
                f"{split.num_tokens} tokens, and one window needs {seq_len + 1}. "
                f"Use data.seq_len={max(2, split.num_tokens - 1)} or less, or prepare more text."
            )
        # a step can touch two epochs; more only where an epoch is shorter than a step
        self._only_stream = lru_cache(maxsize=2)(self._make_only_stream)

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_training_rows, (self.split, self._arguments)

    def rows(self, step: int, rows: np.ndarray) -> Batch:
        """These rows, (R,) of 0 to batch_size - 1, of this step."""
        sample = step * self.batch_size + rows.astype(np.int64)
        epoch_R, window_R = np.divmod(sample, self.num_windows)
        streams: list[Stream] = []
        for epoch in np.unique(epoch_R).tolist():  # ascends, as the rows do
            member = epoch_R == epoch
            key = random_key(self.seed, "windows", epoch)
            window = permuted(window_R[member], size=self.num_windows, key=key)
            block, window_R[member] = self._order.place(window)
            streams += self._streams(epoch, block)
        return pack(streams, window_R, seq_len=self.seq_len, sample=sample)

    def _streams(self, epoch: int, block_B: np.ndarray) -> list[Stream]:
        if self._order.num_blocks == 1:
            return [self._only_stream(epoch)] * len(block_B)
        each, number_B = np.unique(block_B, return_inverse=True)
        streams = self._order.streams(each, seed=self.seed, epoch=epoch)
        return [streams[number] for number in number_B.tolist()]

    def _make_only_stream(self, epoch: int) -> Stream:
        return self._order.streams(np.zeros(1, np.int64), seed=self.seed, epoch=epoch)[0]


def training_batches(
    split: TokenSplit, *, seed: int, seq_len: int, batch_size: int, micro_batch_size: int,
    start_step: int, num_steps: int, rank: int, world_size: int, num_workers: int,
    blocked_signals: Sequence[int] = (),
) -> Iterator[list[Batch]]:  # fmt: skip
    """Yield this rank's micro-batches, (micro_batch_size, seq_len) each, of num_steps steps.

    The first is start_step, so a resumed run goes on with start_step=k and the steps that are
    left. Micro-batch m of rank r holds rows [(m * world_size + r) * micro_batch_size, +micro).
    num_workers processes read ahead; they change neither the rows nor any global generator, and
    do not hear blocked_signals: a group of processes gets Ctrl-C and the scheduler's signals
    together, and the one that trains is to answer.
    Raises DataError if the split is shorter than one window.
    """
    if batch_size % (micro_batch_size * world_size):
        raise ConfigError(
            f"train.batch_size: got {batch_size}; it must be a multiple of train.micro_batch_size="
            f"{micro_batch_size} times {world_size} ranks."
        )
    source = TrainingRows(split, seed=seed, seq_len=seq_len, batch_size=batch_size)
    steps = _Steps(source, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
    wanted = range(start_step, start_step + num_steps)
    if num_workers == 0:
        return (steps[step] for step in wanted)
    step_bytes = 8 * batch_size // world_size * (seq_len + 1)
    _require_shared_memory(num_workers * _AHEAD * _TENSORS * step_bytes, num_workers)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=wanted,
        num_workers=num_workers,
        prefetch_factor=_AHEAD,
        collate_fn=_unchanged,
        # without its own generator DataLoader draws from the global one, and so would shift
        # every random number of a run by the number of workers
        generator=torch.Generator().manual_seed(0),
        # a forked copy of a process with threads or CUDA can hang
        multiprocessing_context="spawn",
    )
    # inherited by the readers and by what Python starts beside them, from the first moment on
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked_signals)
    try:
        # Python's tracker of shared memory unblocks SIGINT and SIGTERM when it is started
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked_signals)
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _require_shared_memory(num_bytes: int, num_workers: int) -> None:
    """Readers hand batches over in /dev/shm; where it is full, all would wait without a word."""
    if not _SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < num_bytes:
        raise ConfigError(
            f"data.num_workers: got {num_workers}, whose batches need {num_bytes / 2**20:,.1f} MiB "
            f"of shared memory, and {_SHARED_MEMORY} has {free / 2**20:,.1f} MiB free. Use "
            "data.num_workers=0, or free it; a container gets more with --shm-size."
        )


def evaluated_documents(split: TokenSplit, *, max_tokens: int) -> np.ndarray:
    """The documents of an evaluation, (D,) int64, about max_tokens in all; 0 means every document.

    Whole documents in stored order; the next one always comes from the domain with the fewest
    tokens so far, so that a budget is shared evenly. Each domain's first document is always
    in, even beyond the budget.
    """
    tokens_D = split.documents["tokens"].astype(np.int64)
    queues = [
        iter(np.flatnonzero(split.documents["domain"] == domain).tolist())
        for domain in range(len(split.domains))
    ]
    taken = dict.fromkeys(range(len(queues)), 0)
    chosen: list[int] = []
    total = 0
    while taken:
        # the fewest: when it has some tokens, every domain has
        domain = min(taken, key=lambda number: (taken[number], number))
        if 0 < max_tokens <= total and taken[domain]:
            break
        document = next(queues[domain], None)
        if document is None:
            del taken[domain]
            continue
        chosen.append(document)
        taken[domain] += int(tokens_D[document])
        total += int(tokens_D[document])
    return np.asarray(chosen, dtype=np.int64)


def evaluated_bytes(split: TokenSplit, *, max_tokens: int) -> dict[str, int]:
    """UTF-8 bytes of text by domain of exactly the documents that evaluation_batches gives.

    Bits per byte = sum of the labels' nats / ln 2 / bytes. The sum includes the end of text of
    each document, which is part of the code's length though it has no bytes.
    """
    chosen = split.documents[evaluated_documents(split, max_tokens=max_tokens)]
    return {
        name: int(chosen["bytes"][chosen["domain"] == number].sum())
        for number, name in enumerate(split.domains)
        if (chosen["domain"] == number).any()
    }


def evaluation_batches(
    split: TokenSplit, *, seq_len: int, batch_size: int, max_tokens: int, rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """Yield (batch_size, seq_len) batches in which all ranks together predict every token once.

    The last window and the last rows are padded, so every rank gets equally many batches of one
    shape. sample numbers the windows.
    """
    stream = make_stream(split, evaluated_documents(split, max_tokens=max_tokens))
    num_windows = -(-(stream.num_tokens - 1) // seq_len)
    per_round = batch_size * world_size
    for start in range(0, num_windows, per_round):
        window = start + rank * batch_size + np.arange(batch_size, dtype=np.int64)
        sample = np.where(window < num_windows, window, -1)
        # far past the end: the next window may still begin with the stream's last token
        window = np.where(window < num_windows, window, stream.num_tokens)
        yield pack([stream] * batch_size, window, seq_len=seq_len, sample=sample)


class _Steps(Dataset[list[Batch]]):
    """Item s is one rank's micro-batches of step s."""

    def __init__(
        self, source: TrainingRows, *, micro_batch_size: int, rank: int, world_size: int
    ) -> None:
        self._source = source
        num_micro = source.batch_size // (micro_batch_size * world_size)
        starts = (np.arange(num_micro) * world_size + rank) * micro_batch_size
        self._rows_of_micro = starts[:, None] + np.arange(micro_batch_size)

    def __getitem__(self, step: int) -> list[Batch]:
        return [self._source.rows(step, rows) for rows in self._rows_of_micro]


def _make_training_rows(split: TokenSplit, arguments: dict[str, int]) -> TrainingRows:
    return TrainingRows(split, **arguments)


def _unchanged(item: list[Batch]) -> list[Batch]:
    return item
