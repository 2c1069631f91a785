"""Where the hosts of a run meet: a store that one of them serves, at a port that must be free."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError
from torch.distributed import TCPStore as TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moe.errors import ConfigError
from moe.launcher_config import LauncherConfig

# the agents' store outlives a failed start, and the ranks' own meeting must not find its remains
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
_HOST_SECONDS = 600  # the other hosts may come up later
_ANSWER_SECONDS = 8


@dataclass(frozen=True)
class Meeting:
    """The store all agents share, and the address under which the others reach this host."""

    store: TCPStore
    address: str


def meet(launcher: LauncherConfig) -> Meeting:
    """Serve the store, or find the host that does. Raises ConfigError where neither is possible."""
    if launcher.rendezvous is None:
        return Meeting(_serve("127.0.0.1", 0), "127.0.0.1")
    host, _, text = launcher.rendezvous.rpartition(":")
    host, port = host.strip("[]"), int(text)
    family, address = _resolve(host)
    serves = launcher.node_rank == 0
    if launcher.node_rank is None:
        serves = _is_address_of_this_host(family, address)
    if serves:
        try:
            return Meeting(_serve(host, port), host)
        except ConfigError:
            if launcher.node_rank == 0 or launcher.num_nodes == 1:
                raise
    store = _join(launcher.rendezvous, host, port)
    return Meeting(store, _address_towards(family, address, port))


def _serve(host: str, port: int) -> TCPStore:
    try:
        return TCPStore(
            host, port, is_master=True, multi_tenant=True, timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )  # fmt: skip
    except (DistError, RuntimeError) as error:
        raise ConfigError(_port_in_use(f"{host}:{port}", _reason(error))) from None


def _join(rendezvous: str, host: str, port: int) -> TCPStore:
    """Wait for the serving host, then for its answer: another program at the port never answers."""
    deadline = time.monotonic() + _HOST_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"launcher.rendezvous: got {rendezvous!r}, where nobody answered for "
                    f"{_HOST_SECONDS} seconds ({error}). Start the host that has this address "
                    "(launcher.node_rank=0), and let the port pass the firewall."
                ) from None
            time.sleep(1)
    found: list[TCPStore] = []

    def connect() -> None:
        store = TCPStore(
            host, port, is_master=False, multi_tenant=True, wait_for_workers=False,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        store.add("phimoe/hosts", 1)
        found.append(store)

    # torch waits for the answer without a limit
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if not found:
        raise ConfigError(_port_in_use(rendezvous, "what listens there is no rendezvous"))
    return found[0]


def _port_in_use(rendezvous: str, reason: str) -> str:
    return (
        f"launcher.rendezvous: cannot meet at {rendezvous}: {reason}. Another program has this "
        "port, or this host has not this address. Give a free port, the same on all hosts."
    )


def _reason(error: Exception) -> str:
    """The end of torch's message, which begins with what it tried."""
    return str(error).partition("message: ")[2] or str(error).splitlines()[0]


def _resolve(host: str) -> tuple[int, str]:
    try:
        family, _, _, _, where = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(
            f"launcher.rendezvous: this host does not know {host!r} ({error.strerror}). Give a "
            "name or address that all hosts know."
        ) from None
    return family, str(where[0])


def _is_address_of_this_host(family: int, address: str) -> bool:
    """Only its own addresses can be bound."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind((address, 0))
    except OSError:
        return False
    return True


def _address_towards(family: int, address: str, port: int) -> str:
    """The address that this host has in the network of the other; nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])
