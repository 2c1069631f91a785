"""Which documents of a prepared folder are traced, in which order, and in which batches.

A pure function of the prepared split and the numbers asked for, so an interrupted trace goes on
with the same batches. Documents of similar length stand in one batch, as shorter ones are padded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from moe.data.loader import evaluated_documents
from moe.data.shards import TokenSplit
from moe.errors import ConfigError, DataError, nearest
from moe.trace.write import Rows

_SORTED_BATCHES = 16  # whose documents are sorted by length together


def choose_documents(
    split: TokenSplit, *, seq_len: int, max_tokens: int, batch_size: int, domains: Sequence[str]
) -> list[np.ndarray]:
    """The batches: document numbers of the split, (batch_size,) int64 each, the last one shorter.

    About max_tokens tokens (0: all), where a document counts up to seq_len of its own, shared
    evenly by the domains; domains: their names, none for all. Raises ConfigError for a name that
    the folder does not have, DataError for a domain without documents in this split.
    """
    wanted = [_domain_number(name, split) for name in domains]
    shortened = shorten(split, seq_len)
    number_D = np.arange(split.num_documents)
    if wanted:
        number_D = np.flatnonzero(np.isin(split.documents["domain"], wanted))
        shortened = dataclasses.replace(shortened, documents=shortened.documents[number_D])
    order_D = number_D[evaluated_documents(shortened, max_tokens=max_tokens)]
    length_D = np.minimum(split.documents["tokens"][order_D].astype(np.int64), seq_len)
    batches = []
    for start in range(0, len(order_D), _SORTED_BATCHES * batch_size):
        part = slice(start, start + _SORTED_BATCHES * batch_size)
        by_length = order_D[part][np.argsort(length_D[part], kind="stable")]
        batches += [by_length[s : s + batch_size] for s in range(0, len(by_length), batch_size)]
    return batches


def shorten(split: TokenSplit, seq_len: int) -> TokenSplit:
    """The same split with each document cut to its first seq_len tokens."""
    documents = split.documents.copy()
    documents["tokens"] = np.minimum(documents["tokens"], seq_len)
    return dataclasses.replace(split, documents=documents)


def empty_domains(split: TokenSplit) -> list[str]:
    """The names of the domains that have no document in this split."""
    present = set(split.documents["domain"].tolist())
    return [name for number, name in enumerate(split.domains) if number not in present]


def load_batch(
    split: TokenSplit, numbers_B: np.ndarray, *, seq_len: int
) -> tuple[torch.Tensor, Rows]:
    """tokens_BS of these documents, padded to the longest of them, and what their places are."""
    texts = [split.tokens(int(number))[:seq_len] for number in numbers_B]
    shape = (len(texts), max(map(len, texts)))
    tokens_BS = np.full(shape, split.manifest.end_of_text_id, dtype=np.int64)
    valid_BS = np.zeros(shape, dtype=bool)
    for row, text in enumerate(texts):
        tokens_BS[row, : len(text)] = text
        valid_BS[row, : len(text)] = True
    domain_B = split.documents["domain"][numbers_B]
    rows = Rows(
        token_T=tokens_BS.ravel(),
        # padding at 0: its places must not count to the length that decides LongRoPE's factors
        position_T=(np.arange(shape[1]) * valid_BS).ravel(),
        document_T=np.repeat(numbers_B, shape[1]),
        domain_T=np.repeat(domain_B, shape[1]),
        valid_T=valid_BS.ravel(),
    )
    return torch.from_numpy(tokens_BS), rows


def _domain_number(name: str, split: TokenSplit) -> int:
    if name not in split.domains:
        raise ConfigError(
            f"domains: got {name!r}; {split.data_dir} has: {', '.join(split.domains)}."
            f"{nearest(name, split.domains)}"
        )
    if name in empty_domains(split):
        raise DataError(
            f"domains: {name!r} has no documents in the {split.name} split of {split.data_dir}. "
            "Leave it out, or trace the other split."
        )
    return split.domains.index(name)
