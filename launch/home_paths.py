"""Paths that begin with ~ are in somebody's home: expanded once, for every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe.errors import ConfigError

# every key that holds a path, or a list of paths, in any command
_PATHS = (
    "compare", "config_json", "data.sources", "data_dir", "launcher.hostfile",
    "launcher.ssh_config", "output", "paths.data_dir", "paths.reports", "paths.run_dir",
    "paths.runs", "prompts_file", "run", "source", "target", "tokenizer", "tokenizer.model_path",
    "trace", "train.init_from", "write_yaml",
)  # fmt: skip


def expand_home(values: dict[str, Any]) -> None:
    """Expand, in place, the paths of a whole configuration; ConfigError for an unknown user."""
    for key in _PATHS:
        *groups, last = key.split(".")
        group: Any = values
        for name in groups:
            group = group.get(name) if isinstance(group, dict) else None
        if not isinstance(group, dict) or last not in group:
            continue
        value = group[last]
        if isinstance(value, str):
            group[last] = _expanded(key, value)
        elif isinstance(value, list):
            group[last] = [_expanded(key, v) if isinstance(v, str) else v for v in value]


def _expanded(key: str, text: str) -> str:
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text.partition("/")[0]
        raise ConfigError(
            f"{key}: got {text!r}, and this machine knows no home of {user!r}. Write the whole "
            f"path, or ./{text} for a folder of that name here."
        ) from None
