"""Put a routing trace into Weights & Biases: a run of its own with the trace as its artifact.

usage: python launch/log_trace.py trace=FOLDER [key=value ...]

examples:
  python launch/log_trace.py trace=traces/nano
  python launch/log_trace.py trace=runs/x/routing logging=online logging.group=nano
  python launch/log_trace.py trace=traces/phi logging.upload_trace_mib=2000
trace is what launch/trace.py wrote, or routing/ of a run. A run that recorded its routing
(train.trace_every) sends it by itself when it ends, up to logging.upload_trace_mib; this is for
traces of checkpoints and converted models, and for larger ones. Offline, the default, the run lies
in the trace's folder until `wandb sync` sends it, from the same working directory.
"""

from __future__ import annotations

from command import run_command

from moe.errors import ConfigError
from moe.log_trace_config import LogTraceConfig


def log(config: LogTraceConfig) -> None:
    """Log the trace and say where it went."""
    if not config.trace:
        raise ConfigError(
            "trace: not given; give the folder that launch/trace.py wrote, or routing/ of a run, "
            "e.g. trace=traces/nano."
        )
    from moe.train.wandb_trace import log_trace

    folder = log_trace(config.logging, config.trace)
    if folder is None:
        print(f"sent: {config.trace}, to the W&B project {config.logging.project}")
    else:
        print(f"offline run: {folder}\nsend it with: wandb sync {folder}")


if __name__ == "__main__":
    run_command("log_trace", LogTraceConfig, log, about=__doc__, writes="trace", literal=("trace",))
