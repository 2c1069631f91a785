"""How the next token is drawn: repetition penalty, temperature, top-k, top-p, then one number.

The steps, their order and their edges are those of transformers' logits processors, so that a
setting means the same there and here; each is a pure function on float32 logits (B, V).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from moe.inference_config import Sampling

OFF = float("-inf")  # the logit of a token that cannot be drawn


def processed_logits(
    logits_BV: Tensor, sampling: Sampling, *, seen_BV: Tensor | None = None
) -> Tensor:
    """Return the float32 logits whose softmax is drawn from.

    seen_BV (bool) marks the tokens of each row's prompt and text so far, padding not among them;
    it is read where sampling.repetition_penalty is not 1. With temperature 0 only the penalty is
    applied: the largest logit wins.
    """
    logits_BV = logits_BV.float()
    if sampling.repetition_penalty != 1.0:
        assert seen_BV is not None
        logits_BV = penalise_repetition(logits_BV, seen_BV, penalty=sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k > 0:
        logits_BV = keep_top_k(logits_BV, k=sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, share=sampling.top_p)
    return logits_BV


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, *, penalty: float) -> Tensor:
    """Divide a seen token's logit by the penalty, or multiply it where it is negative: once, how
    often the token was seen does not count (arXiv 1909.05858, section 4.1)."""
    penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def keep_top_k(logits_BV: Tensor, *, k: int) -> Tensor:
    """Turn off what is below the k-th largest logit; ties with it stay, all of them."""
    least_B1 = logits_BV.topk(min(k, logits_BV.shape[-1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, OFF)


def keep_top_p(logits_BV: Tensor, *, share: float) -> Tensor:
    """Turn off the least likely tokens that together hold at most 1 - share; the likeliest stays.

    The sum runs from the least likely token upwards, which decides how it rounds; where tokens of
    the same logit lie across the edge, the order of the sort decides which of them stay.
    """
    ascending_BV, token_BV = logits_BV.sort(dim=-1)
    is_out_BV = ascending_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - share
    is_out_BV[:, -1] = False
    return logits_BV.masked_fill(is_out_BV.scatter(1, token_BV, is_out_BV), OFF)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return int64 (B,): the token at which the summed probability of a row passes its number.

    uniform_B holds float64 numbers in [0, 1). One number decides a token, so a row's text is its
    own, whatever the batch; sums of float64 leave every token its probability, also the last of a
    large vocabulary, and a token of probability 0 is never drawn.
    """
    summed_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(summed_BV, (uniform_B * summed_BV[:, -1])[:, None], right=True)[:, 0]


def uniform_numbers(
    seed: int, rows: Sequence[int], *, num: int, device: torch.device | str
) -> Tensor:
    """Return float64 (rows, num) in [0, 1), from a generator for each (seed, row) on the CPU.

    Made ahead of the text, so that no step waits for a copy to the device; the first numbers of a
    row do not depend on num, nor on the device.
    """
    numbers = [
        torch.rand(num, generator=_generator(seed, row), dtype=torch.float64) for row in rows
    ]
    return torch.stack(numbers).to(device)


def _generator(seed: int, row: int) -> torch.Generator:
    # hashed: neighbouring seeds and rows must not share numbers, as seed + row would
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]))
