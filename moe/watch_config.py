"""How long a rank may be silent or stand still before the run is ended. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config_checks import check_at_least
from moe.errors import ConfigError


@dataclass(frozen=True)
class WatchConfig:
    """When a rank counts as stopped or hung; a dead one is found at once."""

    enabled: bool = True
    silent_seconds: float = 60.0  # without a sign of life: stopped, swapped out, its node is gone
    stuck_seconds: float = 1800.0  # in one phase without a byte or batch more: hung

    def __post_init__(self) -> None:
        # four pulses fit into it, and a busy machine may delay one by some tenths of a second
        check_at_least("watch.silent_seconds", self.silent_seconds, 1.0)
        check_at_least("watch.stuck_seconds", self.stuck_seconds, 1.0)
        if self.stuck_seconds < self.silent_seconds:
            raise ConfigError(
                f"watch.stuck_seconds: got {self.stuck_seconds}; it must be at least "
                f"watch.silent_seconds={self.silent_seconds}: standing still is only known of a "
                "rank that gives signs of life. Raise it, or lower watch.silent_seconds."
            )
