"""Start the torchrun launcher on every host of a hostfile over ssh, and stay until all have ended.

DeepSpeed's own runner is not used: it adds --local_rank to the command, which Hydra refuses, its
--no_local_rank changes nothing about one exit code for all mistakes, and it needs pdsh on every
machine. Here each host gets its environment as one line of text on the standard input of ssh, so no
secret is seen in a list of processes; signals travel the same way; and its end, also when this
process dies, ends the ranks of that host after a save.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from launchers.hosts_file import Hosts, read_hosts
from launchers.job import Job
from launchers.rank_exit import DONE, FAILED, GAVE_UP, INTERRUPTED, MISTAKE, SAVED
from mistakes import stop

from moe.errors import ConfigError, UserError
from moe.launcher_config import LauncherConfig
from moe.train.stop_request import STOP_SIGNALS, is_kept_ignored

ON_HOST = Path(__file__).resolve().parent.parent / "on_host.py"
_PORT = 29400
# what a host needs from here besides its own environment
_SENT = ("CUDA_", "DS_", "GLOO_", "HF_", "NCCL_", "OMP_", "PHIMOE_", "PYTHON", "TORCH_", "TRITON_",
         "UCX_", "WANDB_")  # fmt: skip
_GRACE_SECONDS = 15  # for hosts to see by themselves that another has ended
_SSH_FAILED = 255


class HostUnreachable(UserError):
    """A host of the hostfile cannot be used."""


@dataclass
class _Remote:
    """One host while its ranks run."""

    name: str
    process: subprocess.Popen[str]
    errors: list[str] = field(default_factory=list)  # its lines that begin with error:


def start(job: Job) -> int:
    """Run the job on all hosts; return its exit code."""
    launcher = job.config.launcher
    hosts = hosts_of(launcher)
    if shutil.which("ssh") is None:
        raise ConfigError(
            "launcher: got hostfile, and there is no ssh on this machine. Install an OpenSSH "
            "client, or start launcher=torchrun on every host yourself."
        )
    _refuse_unreachable(hosts, launcher)
    remotes = [_start(job, hosts, number) for number in range(len(hosts.names))]
    printers = [_print_lines(remote, is_first=remote is remotes[0]) for remote in remotes]
    with _signals_sent_to(remotes) as received:
        codes = _wait(remotes, least=launcher.min_nodes or len(remotes))
    for thread in (thread for pair in printers for thread in pair):
        thread.join(timeout=5)
    return _tell(remotes, codes, was_interrupted=signal.SIGINT in received)


def hosts_of(launcher: LauncherConfig) -> Hosts:
    """The hosts of the configured file."""
    assert launcher.hostfile is not None  # LauncherConfig checks it
    return read_hosts(launcher.hostfile)


def command_on(job: Job, hosts: Hosts, number: int) -> list[str]:
    """The torchrun command of the number-th host."""
    launcher = job.config.launcher
    meeting = launcher.rendezvous or f"{hosts.names[0].rpartition('@')[2]}:{_PORT}"
    options = {
        "num_nodes": len(hosts.names), "processes_per_node": hosts.slots, "node_rank": number,
        "rendezvous": meeting, "max_restarts": launcher.max_restarts,
        "min_nodes": launcher.min_nodes or len(hosts.names),
    }  # fmt: skip
    return job.command(
        job.config.paths.run_dir,
        "launcher=torchrun",
        *(f"launcher.{key}={value}" for key, value in options.items()),
    )


def _ssh(launcher: LauncherConfig, host: str, command: list[str]) -> list[str]:
    config = ["-F", launcher.ssh_config] if launcher.ssh_config else []
    return [
        "ssh", *config, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={launcher.connect_seconds}",
        "-o", "ServerAliveInterval=15", host, shlex.join(command),
    ]  # fmt: skip


def _refuse_unreachable(hosts: Hosts, launcher: LauncherConfig) -> None:
    """Ask every host at once for what it must have; one message names all that cannot be used."""
    here = shlex.join([str(Path.cwd()), sys.executable, str(ON_HOST)])
    check = (
        f'for path in {here}; do [ -e "$path" ] || {{ echo "no $path there" >&2; exit 1; }}; done'
    )
    asked = {
        host: subprocess.Popen(
            _ssh(launcher, host, ["sh", "-c", check]), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for host in hosts.names
    }  # fmt: skip
    wrong = []
    deadline = time.monotonic() + launcher.connect_seconds + 3
    for host, process in asked.items():
        try:
            _, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            if process.returncode != 0:
                wrong.append(f"{host} ({_last_line(said)})")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            wrong.append(f"{host} (no answer in {launcher.connect_seconds} seconds)")
    if wrong:
        raise HostUnreachable(
            f"launcher.hostfile: cannot use {', '.join(wrong)}. Every host needs ssh without a "
            "password, this working directory, this Python and this checkout at the same paths. "
            f"Try: ssh {wrong[0].partition(' ')[0]} true; or take the host out of "
            f"{launcher.hostfile}."
        )


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "ssh says nothing"


def _start(job: Job, hosts: Hosts, number: int) -> _Remote:
    host = hosts.names[number]
    process = subprocess.Popen(
        _ssh(job.config.launcher, host, [sys.executable, str(ON_HOST)]),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C is for this process, which tells the hosts
    )  # fmt: skip
    order = {
        "cwd": str(Path.cwd()),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_SENT)},
        "command": command_on(job, hosts, number),
    }
    _send(process, json.dumps(order))
    return _Remote(host, process)


def _send(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    with suppress(OSError, ValueError):  # it has ended; its exit code says how
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _print_lines(remote: _Remote, *, is_first: bool) -> list[threading.Thread]:
    """Print what a host says as it comes, with its name but for the first; errors are kept."""

    def pump(source: IO[str], target: IO[str]) -> None:
        for line in source:
            if line.startswith("error: "):
                remote.errors.append(line.removeprefix("error: ").strip())
            else:
                print(line if is_first else f"[{remote.name}] {line}", end="", file=target,
                      flush=True)  # fmt: skip

    assert remote.process.stdout is not None
    assert remote.process.stderr is not None
    pairs = ((remote.process.stdout, sys.stdout), (remote.process.stderr, sys.stderr))
    threads = [threading.Thread(target=pump, args=pair, daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    return threads


@contextmanager
def _signals_sent_to(remotes: list[_Remote]) -> Iterator[list[int]]:
    """Pass signals on to every host while the context is open; yields those that came."""
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for remote in remotes:
            _send(remote.process, signal.Signals(number).name)

    before = {
        number: signal.signal(number, forward)
        for number in (*STOP_SIGNALS, signal.SIGINT)
        if not is_kept_ignored(number)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(remotes: list[_Remote], *, least: int) -> list[int]:
    """Wait for all; once too few are left to go on, the others get a while, then are told to."""
    told_at = None
    while any(remote.process.poll() is None for remote in remotes):
        failed = [r for r in remotes if r.process.poll() not in (None, DONE, SAVED)]
        has_refused = any(r.process.returncode in (MISTAKE, GAVE_UP) for r in failed)
        if told_at is None and failed and (has_refused or len(remotes) - len(failed) < least):
            told_at = time.monotonic() + _GRACE_SECONDS
        if told_at is not None and time.monotonic() > told_at:
            for remote in remotes:
                assert remote.process.stdin is not None
                with suppress(OSError):
                    remote.process.stdin.close()
            told_at = float("inf")
        time.sleep(0.1)
    return [remote.process.returncode for remote in remotes]


def _tell(remotes: list[_Remote], codes: list[int], *, was_interrupted: bool) -> int:
    """One message and one exit code for all hosts; a mistake outweighs what came of it."""
    for wanted in (MISTAKE, GAVE_UP, INTERRUPTED):
        for remote, code in zip(remotes, codes, strict=True):
            if code == wanted:
                stop(" ".join(remote.errors) or f"{remote.name} ended with {code}", code)
    if was_interrupted:
        stop("interrupted. The same command with the same paths.run_dir goes on.", INTERRUPTED)
    bad = [(r, c) for r, c in zip(remotes, codes, strict=True) if c not in (DONE, SAVED)]
    if bad:
        lost = [(r, c) for r, c in bad if c == _SSH_FAILED]
        remote, code = (lost or bad)[0]
        how = "its connection was lost" if code == _SSH_FAILED else " ".join(remote.errors)
        stop(f"host {remote.name}: {how or f'it ended with exit code {code}'}", FAILED)
    return SAVED if SAVED in codes else DONE
