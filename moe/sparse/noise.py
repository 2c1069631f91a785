"""Random numbers that depend on which token this is, never on which process computes it.

A generator's stream depends on the order of draws, so on the number of ranks, the micro-batch and
activation recomputation. Here every number is a hash of (seed, sample, place in the window, layer,
purpose, index): the same on 1 process and on 1,000, the same when a block is recomputed, and the
same after a crash without any generator state. The hash is the splitmix64 finaliser (Steele, Lea,
Flood 2014, "Fast splittable pseudorandom number generators", figure 19).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the odd integer nearest to 2**64 / phi
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

PURPOSE_INPUT_JITTER, PURPOSE_EXPERT_SAMPLE, PURPOSE_HEUN = 0, 1, 2
PURPOSE_FEED_FORWARD_DROPOUT, PURPOSE_EMBEDDING_DROPOUT = 3, 4
_NUM_PURPOSES = 8


def token_keys(seed: int, sample_B: Tensor, *, seq_len: int) -> Tensor:
    """Return int64 (B, S) keys, one a token, from the global sample numbers (B,) of the windows."""
    base_B = _mix(_mix(sample_B + 1) + _signed(seed * _GOLDEN))
    place_S = torch.arange(seq_len, device=sample_B.device)
    return _mix(base_B[:, None] + place_S * _GOLDEN)


def uniform(key_T: Tensor, *, layer: int, purpose: int, width: int) -> Tensor:
    """Return float32 (T, width) in the open interval (0, 1), multiples of 2**-24."""
    word = _words(key_T, layer=layer, purpose=purpose, width=width)
    # 23 random bits and a half: exact in float32, and never 0 or 1, so that logarithms are finite
    return (((word >> 41) & (2**23 - 1)).float() + 0.5) * 2.0**-23


def symmetric(key_T: Tensor, *, layer: int, purpose: int, width: int) -> Tensor:
    """Return float32 (T, width) in (-1, 1), of 16 random bits: four numbers from one hash."""
    word = _words(key_T, layer=layer, purpose=purpose, width=-(-width // 4))
    return (word.view(torch.int16)[:, :width].float() + 0.5) * 2.0**-15


def _words(key_T: Tensor, *, layer: int, purpose: int, width: int) -> Tensor:
    stream = _signed((layer * _NUM_PURPOSES + purpose + 1) * 0x632BE59BD9B4E019)
    stream_T = _mix(key_T ^ stream)
    return _mix(stream_T[:, None] + torch.arange(1, width + 1, device=key_T.device) * _GOLDEN)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    # int64 shifts keep the sign; the mask makes the shift logical, as the hash is defined
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Reduce a Python integer to the int64 of the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63
