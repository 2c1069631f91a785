"""Two network namespaces joined by a cable: hosts with an address of their own, for root on Linux.

They share files and processes with this machine, as hosts with a shared file system would; what
one sends the other passes through the cable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from debian_packages import why_missing


@dataclass(frozen=True)
class Host:
    """A namespace and its address."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command, run on this host."""
        return ["ip", "netns", "exec", self.name, *words]


def reason_not_to() -> str:
    """Why this machine cannot have namespaces, or nothing."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if shutil.which("ip") is None:
        return "needs the program ip (Debian: iproute2)"
    name = f"phimoe{os.getpid()}try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode != 0:
        return f"this kernel gives no network namespaces: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


def reason_for_no_ssh() -> str:
    """Why there can be no ssh server here, or nothing; it is installed where that is possible."""
    return why_missing({"ssh": "openssh-client", "sshd": "openssh-server"})


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make both namespaces and the cable, whose ends are called cable on both sides."""
    number = os.getpid()
    hosts = (Host(f"phimoe{number}a", "10.99.7.1"), Host(f"phimoe{number}b", "10.99.7.2"))
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", hosts[0].name, "link", "add", "cable", "type", "veth", "peer", "name", "cable",
            "netns", hosts[1].name)  # fmt: skip
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            _ip("-n", host.name, "link", "set", "cable", "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stderr)


@contextmanager
def ssh_servers(hosts: tuple[Host, ...], folder: Path) -> Iterator[Path]:
    """A server on each host with keys made for this test; yields a file for ssh -F."""
    for name in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\n"
        "UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nPort 2222\n"
        f"PidFile none\n"
    )
    key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"[{h.address}]:2222 {key}" for h in hosts))
    (folder / "ssh_config").write_text(
        f"Host *\n  Port 2222\n  User root\n  IdentityFile {folder}/user_key\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
    )
    servers = [
        subprocess.Popen(
            host.command("/usr/sbin/sshd", "-D", "-f", str(folder / "sshd_config")),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for host in hosts
    ]  # fmt: skip
    try:
        for host in hosts:
            _wait_for_server(host, folder / "ssh_config")
        yield folder / "ssh_config"
    finally:
        for server in servers:
            server.terminate()
            server.wait(timeout=10)


def _wait_for_server(host: Host, config: Path) -> None:
    for _ in range(50):
        done = subprocess.run(
            host.command("ssh", "-F", str(config), "-o", "BatchMode=yes", host.address, "true"),
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode == 0:
            return
        time.sleep(0.1)
    raise AssertionError(done.stderr)
