"""What the command explore can be told; the rules of moe/config.py hold here too."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config_checks import check_at_least
from moe.errors import ConfigError

_HIGHEST_PORT = 65_535


@dataclass(frozen=True)
class ExploreConfig:
    """launch/explore.py: a page in the browser about a run's or a trace's experts."""

    run: str = ""  # a run folder, its log and routing/; without run and trace: the newest of runs/
    trace: str = ""  # the folder that launch/trace.py wrote; of the run, where one is given too
    compare: str = ""  # another run or trace, to stand beside the first
    port: int = 0  # of 127.0.0.1; 0: a free one
    browser: bool = True  # open one, where there is a display

    def __post_init__(self) -> None:
        check_at_least("port", self.port, 0)
        if self.port > _HIGHEST_PORT:
            raise ConfigError(f"port: got {self.port}; it must be 0 to {_HIGHEST_PORT}.")
