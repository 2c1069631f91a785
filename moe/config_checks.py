"""The checks that configuration dataclasses share: each names key, value and what is allowed."""

from __future__ import annotations

import math

from moe.errors import ConfigError, nearest

DEVICE_NAMES = ("auto", "cpu", "cuda")  # of keys that choose where something runs


def check_one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the allowed words."""
    if value not in allowed:
        raise ConfigError(
            f"{key}: got {value!r}; allowed: {', '.join(allowed)}.{nearest(str(value), allowed)}"
        )


def check_at_least(key: str, value: float, least: float) -> None:
    """Refuse a number below least, an infinite one, and NaN."""
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{key}: got {value}; it must be a finite number of at least {least}.")


def check_positive(key: str, value: float) -> None:
    """Refuse 0, negative and infinite numbers, and NaN."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{key}: got {value}; it must be a finite number above 0.")


def check_fraction(key: str, value: float) -> None:
    """Refuse what is not in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{key}: got {value}; it must be at least 0 and below 1.")


def check_seed(key: str, value: int) -> None:
    """Refuse what a 63-bit generator seed cannot hold."""
    if not 0 <= value < 2**63:
        raise ConfigError(f"{key}: got {value}; it must be at least 0 and below 2**63.")


def divisors(number: int) -> str:
    """Return what divides number, as words for a message."""
    most = min(number, 10_000)  # a slip of the keyboard must not be answered with a long search
    found = ", ".join(str(n) for n in range(1, most + 1) if number % n == 0)
    return found if most == number else f"{found}, ..."
