"""How the processes of a run are started: on this machine, by torchrun, SLURM, or over ssh.

Standard library only, like moe/config.py: a mistake here is answered before anything is submitted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe.config_checks import check_at_least, check_one_of
from moe.errors import ConfigError

LAUNCHER_NAMES = ("hostfile", "local", "slurm", "torchrun")
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]
_SLURM_TIME = re.compile(r"\d+|\d+:[0-5]?\d|\d+:[0-5]?\d:[0-5]?\d|\d+-\d+(:[0-5]?\d){0,2}")
_SLURM_WORD = re.compile(r"[\w.,:@&|*\[\]()+/-]+", re.ASCII)
_SLURM_OPTION = re.compile(r"(--)?[a-z][a-z-]*(=[\w.,:@&|*\[\]()+/=%-]+)?", re.ASCII)
_OURS = ("chdir", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output",
         "requeue", "signal", "time")  # fmt: skip


@dataclass(frozen=True)
class LauncherConfig:
    """Who starts the ranks, how many, and how often they are started again.

    Options that the chosen launcher does not use are ignored, so that they may stay in a file.
    """

    name: str = "local"  # one process: this one
    num_nodes: int = 1  # slurm, torchrun; a hostfile has its own number
    processes_per_node: int = 1  # one for each GPU; 0 in hostfile: its slots
    max_restarts: int = 3  # after a rank died or hung; a mistake is never tried again
    # torchrun
    rendezvous: str | None = None  # host:port, the same on all hosts; also for hostfile
    node_rank: int | None = None  # 0 where the rendezvous is; null: found by its address
    min_nodes: int | None = None  # elastic: go on with so many; null: all num_nodes
    # slurm; what is null is left to the cluster's defaults
    job_name: str | None = None  # null: the run's name
    time: str | None = None  # limit of one start of the job, e.g. 12:00:00 or 2-00:00:00
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None  # null: one and one a reader of data; 3 more beside a GPU
    gpus_per_node: int | None = None  # null: one a process, none with parallel.device=cpu
    signal_seconds: int = 120  # so long before the limit, the ranks are told to save
    extra: tuple[str, ...] = ()  # further sbatch options, e.g. [exclusive,mem=64G]
    submit: bool = True  # false: write the script, submit nothing
    # hostfile
    hostfile: str | None = None  # lines "host slots=N", as DeepSpeed has them
    ssh_config: str | None = None  # a file for ssh -F: users, ports, keys
    connect_seconds: int = 10  # how long a host may take to answer

    def __post_init__(self) -> None:
        check_one_of("launcher.name", self.name, LAUNCHER_NAMES)
        for name in ("num_nodes", "processes_per_node", "cpus_per_task", "connect_seconds"):
            if getattr(self, name) is not None:
                check_at_least(f"launcher.{name}", getattr(self, name), 1)
        for name in ("max_restarts", "gpus_per_node", "signal_seconds"):
            if getattr(self, name) is not None:
                check_at_least(f"launcher.{name}", getattr(self, name), 0)
        self._check_rendezvous()
        self._check_nodes()
        self._check_slurm()
        if self.name == "hostfile" and not self.hostfile:
            raise ConfigError(
                "launcher.hostfile: not given, with launcher=hostfile; give a file with a line "
                "`host slots=N` for each host, e.g. launcher.hostfile=hosts.txt."
            )

    @property
    def least_nodes(self) -> int:
        """Nodes that training may go on with."""
        return self.num_nodes if self.min_nodes is None else self.min_nodes

    def _check_rendezvous(self) -> None:
        if self.rendezvous is None:
            if self.name == "torchrun" and self.num_nodes > 1:
                raise ConfigError(
                    f"launcher.rendezvous: not given, with launcher.num_nodes={self.num_nodes}; "
                    "give the name or address of one of the hosts and a free port of it, the same "
                    "on all hosts, e.g. launcher.rendezvous=node01:29400."
                )
            return
        host, _, port = self.rendezvous.rpartition(":")
        is_port = port.isascii() and port.isdigit() and 1 <= int(port) <= 65535
        if not (is_port and re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:]+\]", host, re.ASCII)):
            raise ConfigError(
                f"launcher.rendezvous: got {self.rendezvous!r}; it must be host:port with a port "
                "from 1 to 65535, e.g. launcher.rendezvous=node01:29400."
            )

    def _check_nodes(self) -> None:
        if self.node_rank is not None and not 0 <= self.node_rank < self.num_nodes:
            raise ConfigError(
                f"launcher.node_rank: got {self.node_rank} with "
                f"launcher.num_nodes={self.num_nodes}; allowed: 0 to {self.num_nodes - 1}, another "
                "on each host."
            )
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.num_nodes:
            raise ConfigError(
                f"launcher.min_nodes: got {self.min_nodes}; allowed: 1 to "
                f"launcher.num_nodes={self.num_nodes}."
            )

    def _check_slurm(self) -> None:
        if self.time is not None and not _SLURM_TIME.fullmatch(self.time):
            raise ConfigError(
                f"launcher.time: got {self.time!r}; allowed: minutes, hours:minutes:seconds or "
                "days-hours:minutes:seconds, e.g. launcher.time=12:00:00."
            )
        for name in ("job_name", "partition", "account", "qos", "constraint"):
            word = getattr(self, name)
            # it becomes a line of a shell script
            if word is not None and not _SLURM_WORD.fullmatch(word):
                raise ConfigError(
                    f"launcher.{name}: got {word!r}; allowed: letters, digits and the characters "
                    "_ . , : @ & | * [ ] ( ) + / -"
                )
        for option in self.extra:
            name = option.removeprefix("--").partition("=")[0]
            if name in _OURS or not _SLURM_OPTION.fullmatch(option):
                raise ConfigError(
                    f"launcher.extra: got {option!r}; allowed: long options of sbatch, as name or "
                    f"name=value without spaces, except {', '.join(_OURS)}, which other keys of "
                    "launcher decide. E.g. launcher.extra=[exclusive,mem=64G]."
                )
