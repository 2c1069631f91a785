"""What the command log_trace can be told; the rules of moe/config.py hold here too."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config import LoggingConfig
from moe.errors import ConfigError


@dataclass(frozen=True)
class LogTraceConfig:
    """launch/log_trace.py: a routing trace to W&B."""

    trace: str = ""  # what launch/trace.py wrote, or routing/ of a run
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(job_type="trace"))

    def __post_init__(self) -> None:
        if self.logging.wandb == "disabled":
            raise ConfigError(
                "logging.wandb: got 'disabled', so there is nothing to do; allowed here: offline, "
                "online. Use logging=offline and send it later with `wandb sync`."
            )
