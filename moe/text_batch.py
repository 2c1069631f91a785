"""Texts that grow together by one token at a time, their keys and values in a static cache.

The texts are padded on the left, so that all of them end at the same place of the cache: text i
lies at places padding[i] to num_places. The cache is allocated once, for the longest text that can
come; it never moves, and rows that are taken out leave the others at its front.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.model.attention import KeyValueCache
from moe.model.transformer import Transformer

# Tokens of one pass over whole texts. More would not be faster, and activations grow with them;
# fewer in all, and short prompts of many lengths share a pass in spite of their padding
_NUM_TOKENS_OF_A_PASS = 8192


class TextBatch:
    """Rows in the order of their lengths, longest first; row i holds prompt order[i].

    Rows of equal length are neighbours, so that those which cross LongRoPE's original length
    together are one slice of the cache.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], *, room: int) -> None:
        """Allocate for the prompts (at least one, none empty) and `room` tokens more each."""
        self._model, self._original = model, model.config.rope.original_max_position
        device = model.embed.weight.device
        self.order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        texts = [prompts[row] for row in self.order]
        self.num_places = len(texts[0])
        self._padding = [self.num_places - len(text) for text in texts]
        padded = [[0] * pad + list(text) for pad, text in zip(self._padding, texts, strict=True)]
        length = self.num_places + room
        self._tokens_BS = torch.zeros(len(texts), length, dtype=torch.long, device=device)
        self._tokens_BS[:, : self.num_places] = torch.tensor(padded, device=device)
        self._caches = KeyValueCache.empty(
            model.config, batch=len(texts), length=length, device=device,
            dtype=model.embed.weight.dtype,
        )  # fmt: skip
        self._lay_out()

    def __len__(self) -> int:
        return len(self._padding)

    def read_prompts(self) -> Tensor:
        """Return the logits (B, V) that follow each prompt.

        Prompts of many tokens are read a length at a time, so without padding and its mask.
        """
        if len(self) * self.num_places <= _NUM_TOKENS_OF_A_PASS:
            return self._run_all(num_new=self.num_places - self._padding[0])
        lengths = sorted(set(self._padding))
        return torch.cat([self._run_again(self._rows_with(padding)) for padding in lengths])

    def extend(self, token_B: Tensor) -> Tensor:
        """Add a token to each text; return the logits (B, V) that follow it.

        A text that grows beyond LongRoPE's original length is run again as a whole, for the long
        factors change every one of its keys and every hidden state above the first layer
        (moe/model/attention.py). That costs one pass over original + 1 tokens for each text, once.
        """
        self._tokens_BS[: len(self), self.num_places] = token_B
        self.num_places += 1
        crossing = self._crossing()
        if len(crossing) == len(self):
            return self._run_again(crossing)
        logits_BV = self._run_all(num_new=1)
        if crossing:  # what the pass above wrote for these rows is of mixed factors
            logits_BV[crossing.start : crossing.stop] = self._run_again(crossing)
        return logits_BV

    @property
    def is_about_to_cross(self) -> bool:
        """Whether the next token takes a text beyond LongRoPE's original length."""
        return len(self._crossing(ahead=1)) > 0

    def keep(self, rows: Sequence[int]) -> None:
        """Take all other rows out; rows ascend, and rows[i] becomes row i.

        The copy passes once through the kept rows' part of the cache, layer by layer.
        """
        places = slice(0, self.num_places)
        row_K = torch.tensor(rows, device=self._tokens_BS.device)
        for cache in self._caches:
            for memory in (cache.key, cache.value):
                memory[: len(rows), :, places] = memory[row_K, :, places]
        self._tokens_BS[: len(rows), places] = self._tokens_BS[row_K, places]
        self._padding = [self._padding[row] for row in rows]
        self.order = [self.order[row] for row in rows]
        self._lay_out()

    def _lay_out(self) -> None:
        """What every step needs, as long as the rows stay the same."""
        self._all_caches = self._cut(range(len(self)))
        # places before the longest text hold nothing
        padding = torch.tensor(self._padding, device=self._tokens_BS.device) - self._padding[0]
        self._padding_B = padding if self._padding[0] != self._padding[-1] else None

    def _crossing(self, *, ahead: int = 0) -> range:
        """Rows whose text, `ahead` tokens on, is one token longer than the original length.

        A model without long factors takes no text that long.
        """
        return self._rows_with(self.num_places + ahead - (self._original + 1))

    def _rows_with(self, padding: int) -> range:
        if padding not in self._padding:
            return range(0)
        start = self._padding.index(padding)
        return range(start, start + self._padding.count(padding))

    def _run_again(self, rows: range) -> Tensor:
        """Fill the cache of rows of one length from the start, without their padding."""
        first = self._padding[rows.start]
        num_rows = max(1, _NUM_TOKENS_OF_A_PASS // (self.num_places - first))
        parts = [rows[start : start + num_rows] for start in range(0, len(rows), num_rows)]
        return torch.cat([
            self._model(
                self._tokens_BS[part.start : part.stop, first : self.num_places],
                caches=self._cut(part),
                last_only=True,
            ).logits[:, 0]
            for part in parts
        ])  # fmt: skip

    def _run_all(self, *, num_new: int) -> Tensor:
        """Run the last num_new places of all rows after what is cached."""
        first = self._padding[0]
        return self._model(
            self._tokens_BS[: len(self), self.num_places - num_new : self.num_places],
            padding_B=self._padding_B,
            caches=self._all_caches,
            start=self.num_places - num_new - first,
            last_only=True,
        ).logits[:, 0]

    def _cut(self, rows: range) -> list[KeyValueCache]:
        """The rows' part of the memory, without the padding that all of them have."""
        block, first = slice(rows.start, rows.stop), self._padding[rows.start]
        return [
            KeyValueCache(cache.key[block, :, first:], cache.value[block, :, first:])
            for cache in self._caches
        ]
