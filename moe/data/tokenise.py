"""Text of many documents to token ids, in several processes, in the order of the documents."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from moe.data.load_tokenizer import TextTokenizer, load_tokenizer
from moe.errors import DataError

CHUNK_BYTES = 2 * 2**20  # of text that a process takes at once: about half a second
Chunk = list[tuple[int, int]]  # (offset, length) in bytes of each document in the text file
Tokens = list[np.ndarray]


def num_processes_for(requested: int) -> int:
    """The processes to use: as requested, or one for each core this process may run on."""
    if requested > 0:
        return requested
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tokenise(
    text_path: Path,
    spans: Sequence[tuple[int, int]],
    *,
    tokenizer_path: Path,
    vocab_size: int,
    num_processes: int,
) -> Iterator[np.ndarray]:
    """Yield the ids of each document, (tokens,) uint32, from first token to end of text.

    spans are (offset, length) in bytes of the documents' UTF-8 text in text_path. Processes read
    the text themselves. What comes out does not depend on num_processes.
    """
    chunks = list(_chunks(spans))
    num_processes = min(num_processes, len(chunks))
    if num_processes <= 1:
        tokenizer = load_tokenizer(tokenizer_path, vocab_size=vocab_size)
        for chunk in chunks:
            yield from _tokenise_documents(text_path, chunk, tokenizer)
        return
    # spawn: a forked copy of a process with threads can hang
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_interrupts_to_parent,
    )
    with pool:
        waiting: deque[Future[Tokens]] = deque()
        try:
            for chunk in chunks:
                waiting.append(
                    pool.submit(_tokenise_chunk, text_path, chunk, tokenizer_path, vocab_size)
                )
                # a bound, so that results do not pile up before a slow disk
                if len(waiting) > 2 * num_processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"num_processes={num_processes}: a tokenising process ended unexpectedly, most "
                "often for lack of memory. Use fewer, e.g. num_processes=1."
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _chunks(spans: Sequence[tuple[int, int]]) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for span in spans:
        chunk.append(span)
        size += span[1]
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenise_chunk(text_path: Path, chunk: Chunk, tokenizer_path: Path, vocab_size: int) -> Tokens:
    return _tokenise_documents(text_path, chunk, _loaded_once(tokenizer_path, vocab_size))


# reading cl100k's 100256 ranks takes as long as encoding a chunk: 0.2 s
@functools.lru_cache(maxsize=1)
def _loaded_once(tokenizer_path: Path, vocab_size: int) -> TextTokenizer:
    return load_tokenizer(tokenizer_path, vocab_size=vocab_size)


def _tokenise_documents(text_path: Path, chunk: Chunk, tokenizer: TextTokenizer) -> Tokens:
    found = []
    with text_path.open("rb") as file:
        for offset, length in chunk:
            file.seek(offset)
            ids = tokenizer.encode(file.read(length).decode("utf-8"))
            found.append(
                np.array([tokenizer.bos_id, *ids, tokenizer.end_of_text_id], dtype=np.uint32)
            )
    return found
