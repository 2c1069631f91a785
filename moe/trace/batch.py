"""The routing of some tokens as numpy arrays: what writers, readers and analysis share.

T tokens, L sparse layers, K choices of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

COLUMNS = ("token", "position", "document", "domain", "expert", "weight", "logit", "step")


class Layout(NamedTuple):
    """The shape of a trace's arrays."""

    num_layers: int
    num_experts: int
    top_k: int
    has_logits: bool
    has_steps: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of TraceBatch that a trace of this layout has."""
        left_out = {"logit": not self.has_logits, "step": not self.has_steps}
        return tuple(column for column in COLUMNS if not left_out.get(column))


class TraceBatch(NamedTuple):
    """Rows of a trace in their order; a field that was not read, or not recorded, is None."""

    token_T: np.ndarray  # int32, token ids
    position_T: np.ndarray  # int32, place in its document; 0 is the first token
    document_T: np.ndarray  # int64, see moe.trace.info.TraceInfo.kind
    domain_T: np.ndarray  # int16, index into the trace's domains
    expert_TLK: np.ndarray  # int16, in order of choice
    weight_TLK: np.ndarray  # float32, what multiplied the expert's output
    logit_TLE: np.ndarray | None = None  # float32, the router's, where they were asked for
    step_T: np.ndarray | None = None  # int64, optimiser steps done after this one; training only

    @property
    def num_rows(self) -> int:
        """Tokens of this batch, whichever fields were read."""
        return next(len(values) for values in self if values is not None)


def make_batch(fields: dict[str, np.ndarray]) -> TraceBatch:
    """A batch of the given columns, by their names in COLUMNS; the others are None."""
    return TraceBatch(*(cast(np.ndarray, fields.get(column)) for column in COLUMNS))


def fields_of(batch: TraceBatch) -> dict[str, np.ndarray]:
    """The columns that a batch has, by their names in COLUMNS."""
    pairs = zip(COLUMNS, batch, strict=True)
    return {column: values for column, values in pairs if values is not None}


def slice_rows(batch: TraceBatch, start: int, stop: int) -> TraceBatch:
    """Rows start to stop, as views."""
    return make_batch({column: v[start:stop] for column, v in fields_of(batch).items()})


def join_rows(batches: Sequence[TraceBatch]) -> TraceBatch:
    """One batch of all rows in order; at least one batch, all with the same columns."""
    if len(batches) == 1:
        return batches[0]
    parts = [fields_of(batch) for batch in batches]
    return make_batch({column: np.concatenate([p[column] for p in parts]) for column in parts[0]})
