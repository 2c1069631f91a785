"""The tokens that each expert took with most weight, with the text around them.

At most one token of a document, so that examples differ; of equal weights (SparseMixer gives many
tokens a weight of 1) one is taken by a fixed hash of its place, not the first of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from analysis.batch_checks import check_experts
from moe.trace.batch import TraceBatch, join_rows, slice_rows

NUM_EXAMPLES = 8
REACH = 20  # tokens shown before and after
NOTHING = -1  # in place of a token or expert outside the document
EXAMPLE_COLUMNS = ("token", "position", "document", "domain", "expert", "weight")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # as in analysis.routing_counts, spreads numbers in a row


@dataclass(frozen=True, eq=False)
class Examples:
    """Best first; N examples of each expert, C = 2 REACH + 1 tokens around and with each.

    Unused places have weight NaN and NOTHING elsewhere.
    """

    key_LEN: NDArray[np.uint64]  # weight, then hash: what they are sorted by; 0 for unused
    weight_LEN: NDArray[np.float32]
    document_LEN: NDArray[np.int64]
    step_LEN: NDArray[np.int64]  # 0 but for training
    position_LEN: NDArray[np.int64]
    domain_LEN: NDArray[np.int64]
    token_LENC: NDArray[np.int32]
    expert_LENC: NDArray[np.int16]  # each token's first choice in this layer


def collect_examples(
    batches: Iterable[TraceBatch],
    *,
    num_layers: int,
    num_experts: int,
    num_examples: int = NUM_EXAMPLES,
    reach: int = REACH,
) -> Examples:
    """Read batches (EXAMPLE_COLUMNS, and step where there is one) once; memory is a few batches'.

    A token's context ends where its document does. Raises DataError for experts out of range.
    """
    kept = _empty((num_layers, num_experts, num_examples), context=2 * reach + 1)
    waiting: TraceBatch | None = None  # rows not considered yet, after the context before them
    done = 0  # of these rows, considered before
    for batch in batches:
        check_experts(batch.expert_TLK, num_experts=num_experts)
        joined = batch if waiting is None else join_rows([waiting, batch])
        stop = max(done, joined.num_rows - reach)
        _consider(kept, joined, start=done, stop=stop, reach=reach)
        cut = max(0, stop - reach)
        waiting, done = slice_rows(joined, cut, joined.num_rows), stop - cut
    if waiting is not None:
        _consider(kept, waiting, start=done, stop=waiting.num_rows, reach=reach)
    return kept


def _empty(shape: tuple[int, int, int], *, context: int) -> Examples:
    def of(kind: type, *more: int) -> NDArray:
        return np.full((*shape, *more), NOTHING, kind)

    return Examples(
        key_LEN=np.zeros(shape, np.uint64), weight_LEN=np.full(shape, np.nan, np.float32),
        document_LEN=of(np.int64), step_LEN=of(np.int64), position_LEN=of(np.int64),
        domain_LEN=of(np.int64), token_LENC=of(np.int32, context),
        expert_LENC=of(np.int16, context),
    )  # fmt: skip


def _consider(kept: Examples, batch: TraceBatch, *, start: int, stop: int, reach: int) -> None:
    """Put the tokens of rows start to stop among the kept, in place, where they are better."""
    if start >= stop:
        return
    hash_T = _hash_of_place(batch)[start:stop, None]
    for layer in range(kept.key_LEN.shape[0]):
        weight_TK = np.nan_to_num(batch.weight_TLK[start:stop, layer]).astype(np.float32)
        # the bits of floats that are not negative have the order of their values
        key_TK = (weight_TK.view(np.uint32).astype(np.uint64) << np.uint64(32)) | hash_T
        expert_TK = batch.expert_TLK[start:stop, layer]
        last_E = kept.key_LEN[layer, :, -1]
        row_M, choice_M = np.nonzero(key_TK > last_E[expert_TK])
        if len(row_M):
            found = _describe(
                batch, layer, row_M=row_M + start, key_M=key_TK[row_M, choice_M],
                expert_M=expert_TK[row_M, choice_M], num_examples=kept.key_LEN.shape[2],
                weight_M=weight_TK[row_M, choice_M], reach=reach,
            )  # fmt: skip
            _merge(kept, found, layer)


def _describe(
    batch: TraceBatch, layer: int, *, row_M: NDArray, key_M: NDArray, expert_M: NDArray,
    weight_M: NDArray, num_examples: int, reach: int,
) -> dict[str, NDArray]:  # fmt: skip
    """The best num_examples of each expert among M tokens, by field of Examples, and "expert"."""
    step_T = np.zeros(batch.num_rows, np.int64) if batch.step_T is None else batch.step_T
    best = _best(expert_M, batch.document_T[row_M], step_T[row_M], key_M, num_examples=num_examples)
    row_M, near_C = row_M[best], np.arange(-reach, reach + 1)
    row_MC = row_M[:, None] + near_C
    inside_MC = np.clip(row_MC, 0, batch.num_rows - 1)
    is_near_MC = (row_MC == inside_MC) & (
        batch.document_T[inside_MC] == batch.document_T[row_M, None]
    )
    is_near_MC &= batch.position_T[inside_MC] == batch.position_T[row_M, None] + near_C
    is_near_MC &= step_T[inside_MC] == step_T[row_M, None]
    first_MC = batch.expert_TLK[inside_MC, layer, 0]
    return {
        "expert": expert_M[best], "key_LEN": key_M[best], "weight_LEN": weight_M[best],
        "document_LEN": batch.document_T[row_M], "step_LEN": step_T[row_M],
        "position_LEN": batch.position_T[row_M], "domain_LEN": batch.domain_T[row_M],
        "token_LENC": np.where(is_near_MC, batch.token_T[inside_MC], NOTHING),
        "expert_LENC": np.where(is_near_MC, first_MC, NOTHING),
    }  # fmt: skip


def _best(
    expert_M: NDArray, document_M: NDArray, step_M: NDArray, key_M: NDArray, *, num_examples: int
) -> NDArray[np.int64]:
    """Which of M tokens are the best of their document and among the best of their expert."""
    falling_M = ~key_M
    order_M = np.lexsort((falling_M, step_M, document_M, expert_M))
    is_first_M = np.zeros(len(order_M), bool)
    is_first_M[0] = True
    for value_M in (expert_M, document_M, step_M):
        is_first_M[1:] |= np.diff(value_M[order_M]) != 0
    of_document = order_M[is_first_M]
    order = of_document[np.lexsort((falling_M[of_document], expert_M[of_document]))]
    starts_M = np.searchsorted(expert_M[order], expert_M[order])
    return order[np.arange(len(order)) - starts_M < num_examples]


def _merge(kept: Examples, found: dict[str, NDArray], layer: int) -> None:
    """Keep the best of both for a layer, in place."""
    num_examples = kept.key_LEN.shape[2]
    used_EN = kept.key_LEN[layer] > 0
    expert_M = np.concatenate([np.nonzero(used_EN)[0], found["expert"]])
    names = [field.name for field in fields(Examples)]
    both = {
        name: np.concatenate([getattr(kept, name)[layer][used_EN], found[name]]) for name in names
    }
    best = _best(
        expert_M, both["document_LEN"], both["step_LEN"], both["key_LEN"],
        num_examples=num_examples,
    )  # fmt: skip
    expert_M = expert_M[best]
    place_M = np.arange(len(best)) - np.searchsorted(expert_M, expert_M)
    for name in names:
        getattr(kept, name)[layer, expert_M, place_M] = both[name][best]


def _hash_of_place(batch: TraceBatch) -> NDArray[np.uint64]:
    # never 0, so that a token of weight 0 is still above an unused place
    mixed_T = batch.document_T.astype(np.uint64) * _MIX + batch.position_T.astype(np.uint64)
    mixed_T = (mixed_T ^ (mixed_T >> np.uint64(29))) * _MIX
    return (mixed_T >> np.uint64(32)) | np.uint64(1)
