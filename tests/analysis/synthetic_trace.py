"""Routing of random tokens with known structure: documents, domains, uneven and dead experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe.trace.batch import Layout, TraceBatch
from moe.trace.info import SCHEMA_VERSION, TRACE_NAME, PartEntry, TraceInfo, write_info
from moe.trace.parquet import PartFile


def random_batch(
    seed: int,
    *,
    tokens: int = 200,
    layers: int = 3,
    choices: int = 2,
    experts: int = 8,
    domains: int = 3,
    vocab: int = 50,
    mean_document: int = 12,
    with_logits: bool = True,
) -> TraceBatch:
    """Documents of about mean_document tokens, each of one domain; experts are the largest logits.

    Logits depend on the domain, the token id and noise, so that all metrics have something to find.
    """
    source = np.random.default_rng(seed)
    document_T = np.cumsum(source.random(tokens) < 1 / mean_document)
    starts_T = np.flatnonzero(np.diff(document_T, prepend=-1))
    lengths = np.diff(np.append(starts_T, tokens))
    position_T = np.arange(tokens) - np.repeat(starts_T, lengths)
    domain_T = source.integers(domains, size=int(document_T[-1]) + 1 if tokens else 1)[document_T]
    token_T = source.integers(vocab, size=tokens)
    taste = source.normal(size=(domains, layers, experts), scale=0.7)
    habit = source.normal(size=(vocab, layers, experts), scale=0.7)
    logit_TLE = taste[domain_T] + habit[token_T] + source.normal(size=(tokens, layers, experts))
    logit_TLE = logit_TLE.astype(np.float32)
    expert_TLK = np.argsort(-logit_TLE, axis=-1, kind="stable")[:, :, :choices]
    chosen = np.take_along_axis(logit_TLE, expert_TLK, axis=-1)
    weight_TLK = np.exp(chosen) / np.exp(logit_TLE).sum(axis=-1, keepdims=True)
    return TraceBatch(
        token_T.astype(np.int32),
        position_T.astype(np.int32),
        document_T.astype(np.int64),
        domain_T.astype(np.int16),
        expert_TLK.astype(np.int16),
        weight_TLK.astype(np.float32),
        logit_TLE if with_logits else None,
    )


def rows(batch: TraceBatch, order: np.ndarray | slice) -> TraceBatch:
    """The batch's rows in another order, or some of them."""
    return batch._make(None if column is None else column[order] for column in batch)


def write_trace(
    folder: Path, batches: Iterator[TraceBatch], *, layout: Layout, domains: tuple[str, ...]
) -> Path:
    """Write a finished trace of one part to folder, in the format of moe.trace."""
    folder.mkdir(parents=True, exist_ok=True)
    part = PartFile(folder / "part_00000.parquet", layout, row_group_tokens=2**16)
    tokens = np.zeros(len(domains), np.int64)
    documents = 0
    for batch in batches:
        part.add(batch)
        tokens += np.bincount(batch.domain_T, minlength=len(domains))
        documents = max(documents, int(batch.document_T.max()) + 1)
    written = part.finish()
    entry = PartEntry(
        "part_00000.parquet", written.size, written.sha256, 1, documents,
        tuple(tokens.tolist()),
    )  # fmt: skip
    info = TraceInfo(
        SCHEMA_VERSION, "training" if layout.has_steps else "documents", layout.num_layers,
        layout.num_experts, layout.top_k, layout.has_logits, domains, "0" * 64, "0" * 64, "{}",
        parts=(entry,),
    )  # fmt: skip
    write_info(folder / TRACE_NAME, info)
    return folder
