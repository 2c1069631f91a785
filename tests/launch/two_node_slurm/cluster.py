"""Two real SLURM nodes on this one machine, as long as a context is open; needs root on Debian.

Both nodes share the machine's cores, so nothing is measured here: it is sbatch, srun, signals and
requeueing as a cluster has them. Packages are installed when they are missing (about ten seconds).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from debian_packages import why_missing

PACKAGES = {"sbatch": "slurm-wlm", "slurmctld": "slurm-wlm", "munged": "munge"}
_CONF = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
KillWait=10
SchedulerParameters=bf_interval=1,sched_interval=2
NodeName=s1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1 State=UNKNOWN
NodeName=s2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1 State=UNKNOWN
PartitionName=mini Nodes=s1,s2 Default=YES MaxTime=INFINITE State=UP
"""


def reason_not_to() -> str:
    """Why this machine cannot be a cluster, or nothing."""
    if os.geteuid() != 0:
        return "needs root, for munge and SLURM's daemons"
    return why_missing(PACKAGES)


@contextmanager
def two_nodes(folder: Path) -> Iterator[dict[str, str]]:
    """Start the cluster; yields the environment in which its commands work."""
    for name in ("state", "s1", "s2"):
        (folder / name).mkdir(parents=True)
    port, first, second = _free_ports(3)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(_CONF.format(host=host, folder=folder, port=port, first=first, second=second))
    munge = _start_munge(folder)
    environment = os.environ | {"SLURM_CONF": str(conf)}
    daemons = [
        subprocess.Popen([*command, "-D", "-f", str(conf)], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
        for command in (["slurmctld", "-c"], ["slurmd", "-N", "s1"], ["slurmd", "-N", "s2"])
    ]  # fmt: skip
    try:
        _wait_for_nodes(environment, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=environment,
                       capture_output=True)  # fmt: skip
        time.sleep(1)
        for daemon in (*daemons, *munge):
            daemon.terminate()
        for daemon in (*daemons, *munge):
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()
            daemon.wait()


def _start_munge(folder: Path) -> list[subprocess.Popen[bytes]]:
    """Munge is one for the machine: it is started only where it does not run."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return []
    run = Path("/run/munge")
    run.mkdir(exist_ok=True)
    shutil.chown(run, "munge")
    with (folder / "munged.log").open("wb") as log:
        daemon = subprocess.Popen(
            ["runuser", "-u", "munge", "--", "/usr/sbin/munged", "--foreground"],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    for _ in range(50):
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return [daemon]
        time.sleep(0.1)
    raise AssertionError((folder / "munged.log").read_text())


def _wait_for_nodes(environment: dict[str, str], folder: Path) -> None:
    for _ in range(150):
        said = subprocess.run(
            ["sinfo", "--noheader", "--format=%D %t"], env=environment, capture_output=True,
            text=True,
        ).stdout.split()  # fmt: skip
        if said == ["2", "idle"]:
            return
        time.sleep(0.2)
    raise AssertionError((folder / "slurmctld.log").read_text()[-3000:])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
    finally:
        for free in sockets:
            free.close()
