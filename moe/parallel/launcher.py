"""What the launcher (torchrun) says of this process; without torch, so that it is known early."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moe.errors import ConfigError

# set where the parent of a rank is a launcher whose end must end the rank, too: torchrun's agent,
# and the daemon of a job step of our batch script
OWN_LAUNCHER_VARIABLE = "PHIMOE_LAUNCHER"
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", OWN_LAUNCHER_VARIABLE)


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this machine


def read_launch() -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; one process where they are not set.

    Raises ConfigError for values that no launcher sets: joining them would wait for ever.
    """
    world_size = _number("WORLD_SIZE", 1)
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"environment variable RANK: got {rank} with WORLD_SIZE={world_size}; allowed: 0 to "
            f"WORLD_SIZE - 1. {_FIX}"
        )
    if world_size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ConfigError(
                    f"environment variable {name}: not set, with WORLD_SIZE={world_size}. {_FIX}"
                )
    return Launch(rank, world_size, local_rank)


_FIX = "Start several processes with torchrun, or unset WORLD_SIZE to run one process."


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            f"environment variable {name}: got {text!r}; it must be a whole number. {_FIX}"
        )
    return int(text)
