"""A trace of many random tokens on disk, for measuring what reading and analysing one costs.

Experts depend on the token id and on chance, so that no table is empty; what exactly the rows hold
changes neither time nor memory much.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.data.manifest import FileEntry
from moe.trace.batch import Layout, TraceBatch
from moe.trace.info import (
    SCHEMA_VERSION,
    TRACE_NAME,
    VOCABULARY_NAME,
    PartEntry,
    TraceInfo,
    rank_name,
    write_info,
)
from moe.trace.parquet import PartFile
from moe.trace.write import ROW_GROUP_TOKENS
from moe.train.atomic_files import hash_file, replace_file

VOCAB, DOMAINS, DOCUMENT = 32_064, 8, 500


@dataclass(frozen=True)
class Shape:
    """What is written: layout, how many tokens, in how many parts (steps, of a training run)."""

    name: str
    layout: Layout
    num_tokens: int
    num_parts: int


def write_random_trace(folder: Path, shape: Shape) -> None:
    """Write a finished trace to a new folder, with memory for one row group."""
    folder.mkdir(parents=True)
    source, parts = np.random.default_rng(0), []
    for number in range(shape.num_parts):
        first, stop = (shape.num_tokens * n // shape.num_parts for n in (number, number + 1))
        name = f"part-{number:05d}.parquet"
        file = PartFile(folder / name, shape.layout, row_group_tokens=ROW_GROUP_TOKENS)
        tokens = np.zeros(DOMAINS, np.int64)
        for batch in _batches(source, first, stop, shape.layout, step=number + 1):
            file.add(batch)
            tokens += np.bincount(batch.domain_T, minlength=DOMAINS)
        written = file.finish()
        parts.append(PartEntry(
            name, written.size, written.sha256, 1, (stop - first) // DOCUMENT,
            tuple(tokens.tolist()), step=number + 1 if shape.layout.has_steps else 0,
        ))  # fmt: skip
    replace_file(folder / VOCABULARY_NAME, json.dumps([f" word{n}" for n in range(VOCAB)]).encode())
    words, _ = hash_file(folder / VOCABULARY_NAME)
    write_info(
        folder / (rank_name(0) if shape.layout.has_steps else TRACE_NAME),
        TraceInfo(
            SCHEMA_VERSION, "training" if shape.layout.has_steps else "documents",
            shape.layout.num_layers, shape.layout.num_experts, shape.layout.top_k,
            shape.layout.has_logits, tuple(f"domain{n}" for n in range(DOMAINS)), "0" * 64,
            "0" * 64, "{}", parts=tuple(parts),
            vocabulary=FileEntry(VOCABULARY_NAME, words.size, words.sha256),
        ),
    )  # fmt: skip


def _batches(
    source: np.random.Generator, first: int, stop: int, layout: Layout, *, step: int
) -> Iterator[TraceBatch]:
    experts, choices = layout.num_experts, layout.top_k
    for start in range(first, stop, ROW_GROUP_TOKENS):
        row_T = np.arange(start, min(start + ROW_GROUP_TOKENS, stop))
        size = len(row_T)
        token_T = source.zipf(1.3, size=size).clip(max=VOCAB).astype(np.int32) - 1
        # four experts that an id prefers, by layer; choices in a row never meet
        first_TL = token_T[:, None] % 4 * 4 + source.integers(4, size=(size, layout.num_layers))
        offset_TL1 = source.integers(1, experts - choices + 2, size=(size, layout.num_layers, 1))
        offset_TLK = np.concatenate(
            [np.zeros_like(offset_TL1), offset_TL1 + np.arange(choices - 1)], axis=2
        )
        shape = (size, layout.num_layers)
        yield TraceBatch(
            token_T,
            (row_T % DOCUMENT).astype(np.int32),
            row_T // DOCUMENT,
            (row_T // DOCUMENT % DOMAINS).astype(np.int16),
            ((first_TL[..., None] + offset_TLK) % experts).astype(np.int16),
            source.random((*shape, choices), dtype=np.float32),
            source.standard_normal((*shape, experts), dtype=np.float32)
            if layout.has_logits
            else None,
            np.full(size, step) if layout.has_steps else None,
        )
