"""Which of our commands takes a key or a group, so that a stray one can be sent home."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from moe.config_from_dict import known_keys

_CONF = Path(__file__).resolve().parent.parent / "conf"
# most used first
COMMANDS = {
    "train": "moe.config.TrainConfig",
    "prepare_data": "moe.config.PrepareConfig",
    "generate": "moe.inference_config.GenerateConfig",
    "evaluate": "moe.inference_config.EvaluateConfig",
    "trace": "moe.trace_config.TraceConfig",
    "convert": "moe.convert_config.ConvertConfig",
    "compare": "moe.compare_config.CompareConfig",
    "plan": "moe.plan_config.PlanConfig",
    "inspect_model": "moe.inspect_config.InspectConfig",
    "explore": "moe.explore_config.ExploreConfig",
    "log_trace": "moe.log_trace_config.LogTraceConfig",
}


def takers(key: str) -> list[str]:
    """The commands that have this key or group."""
    return [
        name
        for name in COMMANDS
        if key in chosen_groups(name) or key in known_keys(schema_of(name))
    ]


def chosen_groups(name: str) -> dict[str, Any]:
    """Each group that a command's defaults list names, and the option there."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(_CONF / f"{name}.yaml"))
    return {
        group: option
        for entry in entries.get("defaults", ())
        if isinstance(entry, dict)
        for group, option in entry.items()
        if not group.startswith("override ")
    }


def schema_of(name: str) -> type:
    """The dataclass of a command's configuration."""
    module, _, cls = COMMANDS[name].rpartition(".")
    return getattr(import_module(module), cls)
