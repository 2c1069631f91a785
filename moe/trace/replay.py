"""A recorded trace as batches for a model, each with its routing to force.

    for batch in replay_batches(trace, model.config):
        output = model(batch.tokens_BS, position_BS=batch.position_BS, forced=batch.forced)

In float32 on the machine that recorded a document trace, the logits are those of the model that
was traced, bit for bit: batches have the shapes they had, and padding, which is not recorded, is
routed by the router itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.model_config import ModelConfig
from moe.sparse.forced import Forced
from moe.trace.batch import TraceBatch, join_rows, slice_rows
from moe.trace.read import Trace

_COLUMNS = ("token", "document", "domain", "expert", "weight")
_TRAINING_BATCH = 8  # documents; a training trace does not keep its windows


@dataclass(frozen=True)
class ReplayBatch:
    """Documents of a trace, padded to the longest, B rows of S places; T = B * S."""

    tokens_BS: Tensor  # int64
    valid_BS: Tensor  # bool; the others are padding
    document_BS: Tensor  # int64, as in the trace; -1 is padding
    domain_BS: Tensor  # int64; -1 is padding
    forced: tuple[Forced, ...]  # one a layer, padding free

    @property
    def position_BS(self) -> Tensor:
        """Of each token in its document; 0 for padding, which counts to no document's length."""
        places_S = torch.arange(self.tokens_BS.shape[1], device=self.tokens_BS.device)
        return places_S * self.valid_BS

    def to(self, device: torch.device | str) -> ReplayBatch:
        """The same batch on another device."""
        return ReplayBatch(
            self.tokens_BS.to(device),
            self.valid_BS.to(device),
            self.document_BS.to(device),
            self.domain_BS.to(device),
            tuple(Forced(f.expert_TK.to(device), f.weight_TK.to(device)) for f in self.forced),
        )


def replay_batches(
    trace: Trace,
    model: ModelConfig,
    *,
    batch_size: int | None = None,
    steps: Sequence[int] | None = None,
) -> Iterator[ReplayBatch]:
    """Yield all documents of a trace in order, batch_size at once (as recorded if absent).

    steps: of a training trace, which of them. Raises ConfigError where the trace is of a model
    with another number of layers, experts, choices or ids, DataError where it is damaged.
    """
    _refuse_other_shape(trace, model)
    recorded = trace.info.setting("batch_size") if trace.info.kind == "documents" else None
    size = batch_size or recorded or _TRAINING_BATCH
    pad_id = trace.info.setting("pad_id")
    waiting: list[TraceBatch] = []
    for document in _documents(trace, steps):
        waiting.append(document)
        if len(waiting) == size:
            yield _padded(waiting, pad_id=pad_id)
            waiting = []
    if waiting:
        yield _padded(waiting, pad_id=pad_id)


def without_expert(forced: Forced, expert: int) -> Forced:
    """The same choices, but what this expert answers counts for nothing: its weights are 0."""
    is_it_TK = forced.expert_TK == expert
    return Forced(forced.expert_TK, forced.weight_TK.masked_fill(is_it_TK, 0.0))


def _documents(trace: Trace, steps: Sequence[int] | None) -> Iterator[TraceBatch]:
    """The rows of one document after another."""
    begun: list[TraceBatch] = []  # rows of a document that may go on in the next batch
    for batch in trace.batches(_COLUMNS, steps=steps):
        number_T = batch.document_T
        if begun and begun[0].document_T[0] != number_T[0]:
            yield join_rows(begun)
            begun = []
        cuts = [*(np.flatnonzero(number_T[1:] != number_T[:-1]) + 1).tolist(), len(number_T)]
        start = 0
        for stop in cuts:
            begun.append(slice_rows(batch, start, stop))
            if stop < len(number_T):
                yield join_rows(begun)
                begun = []
            start = stop
    if begun:
        yield join_rows(begun)


def _padded(documents: list[TraceBatch], *, pad_id: int) -> ReplayBatch:
    num_layers, top_k = documents[0].expert_TLK.shape[1:]
    shape = (len(documents), max(document.num_rows for document in documents))
    tokens_BS = np.full(shape, pad_id, dtype=np.int64)
    number_BS, domain_BS = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    expert_LBSK = np.full((num_layers, *shape, top_k), -1, dtype=np.int64)
    weight_LBSK = np.zeros((num_layers, *shape, top_k), dtype=np.float32)
    for row, document in enumerate(documents):
        places = slice(0, document.num_rows)
        tokens_BS[row, places] = document.token_T
        number_BS[row, places] = document.document_T
        domain_BS[row, places] = document.domain_T
        expert_LBSK[:, row, places] = document.expert_TLK.swapaxes(0, 1)
        weight_LBSK[:, row, places] = document.weight_TLK.swapaxes(0, 1)
    experts, weights = torch.from_numpy(expert_LBSK), torch.from_numpy(weight_LBSK)
    number_BS = torch.from_numpy(number_BS)
    return ReplayBatch(
        tokens_BS=torch.from_numpy(tokens_BS),
        valid_BS=number_BS >= 0,
        document_BS=number_BS,
        domain_BS=torch.from_numpy(domain_BS),
        forced=tuple(
            Forced(expert_BSK.flatten(0, 1), weight_BSK.flatten(0, 1))
            for expert_BSK, weight_BSK in zip(experts, weights, strict=True)
        ),
    )


def _refuse_other_shape(trace: Trace, model: ModelConfig) -> None:
    if not model.is_sparse:
        raise ConfigError(
            f"model: {model.name} is dense; a routing can be forced on a model with experts only."
        )
    for name in ("num_layers", "num_experts", "top_k"):
        recorded, has = getattr(trace.info, name), getattr(model, name)
        if recorded != has:
            raise ConfigError(
                f"trace: {trace.folder} was recorded with {name}={recorded}; model {model.name} "
                f"has {has}. Replay a trace of a model of the same shape."
            )
    if trace.info.setting("pad_id") >= model.vocab_size:
        raise ConfigError(
            f"trace: {trace.folder} has token ids beyond model {model.name}'s {model.vocab_size}. "
            "Replay a trace of a model with the same tokenizer."
        )
