"""A small recorded routing, as a run leaves it in routing/: drawn at random, really written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from moe.data.manifest import FileEntry
from moe.sparse.router import Routing
from moe.trace.info import (
    SCHEMA_VERSION,
    VOCABULARY_NAME,
    PartEntry,
    TraceInfo,
    rank_name,
    write_info,
)
from moe.trace.write import PartLabel, Rows, TraceWriter
from moe.train.atomic_files import hash_file

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 4, 2


def write_routing(folder: Path, *, num_steps: int = 2, num_tokens: int = 50) -> Path:
    """Write num_steps recorded steps of one rank, in two domains; returns the folder."""
    folder.mkdir(parents=True)
    info = TraceInfo(
        schema_version=SCHEMA_VERSION, kind="training", num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS, top_k=TOP_K, has_logits=False, domains=("code", "prose"),
        model_sha256="a" * 64, data_fingerprint="b" * 64,
        settings=json.dumps(
            {"model": "tiny", "router": "topk", "seq_len": 25, "checkpoint": str(folder)}
        ),
    )  # fmt: skip
    parts: list[PartEntry] = []
    draw = np.random.default_rng(0)
    with TraceWriter(folder, info.layout, num_domains=2, on_part=parts.append) as writer:
        for step in range(1, num_steps + 1):
            label = PartLabel(f"step_{step:08d}.rank_00000.parquet", step)
            writer.put(label, _rows(draw, num_tokens), _routings(draw, num_tokens))
            writer.end_part()
    (folder / VOCABULARY_NAME).write_text(json.dumps(["a", "b"]))
    written, _ = hash_file(folder / VOCABULARY_NAME)
    entry = FileEntry(VOCABULARY_NAME, written.size, written.sha256)
    write_info(
        folder / rank_name(0), dataclasses.replace(info, parts=tuple(parts), vocabulary=entry)
    )
    return folder


def _rows(draw: np.random.Generator, num_tokens: int) -> Rows:
    token_T = np.arange(num_tokens)
    return Rows(
        token_T=draw.integers(0, 30_000, num_tokens),
        position_T=token_T % 25,
        document_T=token_T // 25,
        domain_T=token_T // 25 % 2,
        valid_T=np.ones(num_tokens, bool),
    )


def _routings(draw: np.random.Generator, num_tokens: int) -> list[Routing]:
    routings = []
    for _ in range(NUM_LAYERS):
        logit_TE = torch.from_numpy(draw.standard_normal((num_tokens, NUM_EXPERTS))).float()
        weight_TK, expert_TK = logit_TE.softmax(-1).topk(TOP_K)
        count_E = torch.bincount(expert_TK.flatten(), minlength=NUM_EXPERTS)
        routings.append(Routing(weight_TK, expert_TK, logit_TE, count_E))
    return routings
