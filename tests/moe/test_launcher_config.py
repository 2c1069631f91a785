"""How a run is started is checked before anything starts: key, value, what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from moe.errors import ConfigError
from moe.launcher_config import LauncherConfig

MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown": ({"name": "torchrn"}, ["launcher.name", "torchrn", "slurm", "'torchrun'"]),
    "no_process": ({"processes_per_node": 0}, ["launcher.processes_per_node: got 0", "at least 1"]),
    "no_node": ({"num_nodes": 0}, ["launcher.num_nodes: got 0"]),
    "restarts": ({"max_restarts": -1}, ["launcher.max_restarts: got -1", "at least 0"]),
    "nowhere_to_meet": (
        {"name": "torchrun", "num_nodes": 2}, ["launcher.rendezvous: not given", "node01:29400"],
    ),
    "no_port": ({"rendezvous": "node01"}, ["launcher.rendezvous", "'node01'", "host:port"]),
    "port_zero": ({"rendezvous": "node01:0"}, ["launcher.rendezvous", "1 to 65535"]),
    "port_too_high": ({"rendezvous": "node01:65536"}, ["launcher.rendezvous", "1 to 65535"]),
    "shell_in_host": ({"rendezvous": "a;b:29400"}, ["launcher.rendezvous", "host:port"]),
    "node_rank": ({"num_nodes": 2, "node_rank": 2}, ["launcher.node_rank: got 2", "0 to 1"]),
    "too_few": ({"num_nodes": 2, "min_nodes": 0}, ["launcher.min_nodes: got 0", "1 to"]),
    "too_many": ({"num_nodes": 2, "min_nodes": 3}, ["launcher.min_nodes: got 3", "num_nodes=2"]),
    "time": ({"time": "12h"}, ["launcher.time: got '12h'", "launcher.time=12:00:00"]),
    "seconds_of_time": ({"time": "1:00:75"}, ["launcher.time", "hours:minutes:seconds"]),
    "two_lines": ({"partition": "a\n#SBATCH --x"}, ["launcher.partition", "letters"]),
    "space": ({"job_name": "my job"}, ["launcher.job_name", "letters"]),
    "final_newline": ({"account": "a\n"}, ["launcher.account", "letters"]),
    "ours": ({"extra": ("--nodes=3",)}, ["launcher.extra", "--nodes=3", "except", "nodes"]),
    "extra_line": ({"extra": ("mem=1\nrm x",)}, ["launcher.extra", "name=value"]),
    "short_option": ({"extra": ("-x",)}, ["launcher.extra", "'-x'", "[exclusive,mem=64G]"]),
    "no_file": ({"name": "hostfile"}, ["launcher.hostfile: not given", "host slots=N"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_names_key_value_and_what_is_allowed(case: str) -> None:
    values, words = MISTAKES[case]
    with pytest.raises(ConfigError) as raised:
        LauncherConfig(**values)
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize("time", ["30", "30:00", "12:00:00", "2-0", "2-12:30", "2-12:30:00"])
def test_every_way_to_write_a_limit_is_taken(time: str) -> None:
    assert LauncherConfig(time=time).time == time


@pytest.mark.parametrize("rendezvous", ["node01:29400", "10.0.0.1:1", "[fd00::1]:29400"])
def test_names_and_addresses_are_places_to_meet(rendezvous: str) -> None:
    config = LauncherConfig(name="torchrun", num_nodes=2, rendezvous=rendezvous)
    assert (config.rendezvous, config.least_nodes) == (rendezvous, 2)


def test_options_of_other_launchers_may_stay_in_a_file() -> None:
    config = LauncherConfig(name="local", num_nodes=4, partition="gpu", extra=("mem=64G",))
    assert config.name == "local"
