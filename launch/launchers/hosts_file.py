"""Which hosts a hostfile names: lines "host slots=N", as DeepSpeed has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moe.errors import ConfigError

# not a leading dash: ssh would take it for an option
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_][\w.@-]*)\s+slots\s*=\s*(?P<slots>\d+)", re.ASCII)


@dataclass(frozen=True)
class Hosts:
    """Hosts in the order of the file, and how many processes each runs."""

    names: tuple[str, ...]
    slots: int


def read_hosts(path: str) -> Hosts:
    """Read a hostfile. Raises ConfigError naming the line that is wrong."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(
            f"launcher.hostfile: cannot read {path!r}: {reason} (working directory {Path.cwd()}). "
            "Give a file with a line `host slots=N` for each host."
        ) from None
    slots_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None or int(match["slots"]) < 1:
            raise ConfigError(
                f"launcher.hostfile: {path}, line {number}: got {line!r}; it must be "
                f"`host slots=N` with N at least 1, e.g. `node01 slots=8`.{_advice(line)}"
            )
        if match["name"] in slots_of:
            raise ConfigError(
                f"launcher.hostfile: {path}, line {number}: {match['name']!r} is there twice; "
                "name each host once, with all its slots."
            )
        slots_of[match["name"]] = int(match["slots"])
    if not slots_of:
        raise ConfigError(
            f"launcher.hostfile: {path} names no host; write a line `host slots=N` for each."
        )
    if len(set(slots_of.values())) > 1:
        listed = ", ".join(f"{name} {slots}" for name, slots in slots_of.items())
        raise ConfigError(
            f"launcher.hostfile: {path}: got different numbers of slots ({listed}); every host "
            "runs equally many processes. Give all the smallest number."
        )
    return Hosts(tuple(slots_of), next(iter(slots_of.values())))


def _advice(line: str) -> str:
    name = line.split()[0]
    if name.count(":") > 1:  # host:port would not say whether its last part is a port
        return " An IPv6 address needs a name: give it one in /etc/hosts of every host."
    if ":" in name:
        return " A port for ssh belongs into a Host entry of launcher.ssh_config."
    return ""
