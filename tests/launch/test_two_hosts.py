"""Two hosts with addresses of their own (network namespaces): torchrun on both, and ssh to both.

Needs root and, for ssh, Debian's openssh-server, which it installs; says why where it cannot.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from two_hosts import Host, reason_for_no_ssh, reason_not_to, ssh_servers, two_hosts

from moe.train.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MORE = ["train.micro_batch_size=4", "train.evaluate_tokens=500", "train.sample_tokens=0"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    reason = reason_not_to()
    if reason:
        pytest.skip(f"two hosts on this machine: {reason}")
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def ssh_config(hosts, tmp_path_factory) -> Iterator[Path]:
    reason = reason_for_no_ssh()
    if reason:
        pytest.skip(f"ssh between two hosts: {reason}")
    with ssh_servers(hosts, tmp_path_factory.mktemp("ssh")) as config:
        yield config


@pytest.fixture
def train_on(environment, workplace, place) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Call train_on(host, *overrides): launch/train.py on that host, both outputs in one."""
    started = []

    def start(host: Host, *overrides: str) -> subprocess.Popen[str]:
        keys = {a.partition("=")[0] for a in overrides}
        usual = [a for a in workplace.train if a != "parallel=plain"]
        usual = [a for a in [*usual, *MORE] if a.partition("=")[0] not in keys]
        process = subprocess.Popen(
            host.command(sys.executable, str(ROOT / "launch/train.py"), *usual, *overrides),
            cwd=place, env=environment | {"GLOO_SOCKET_IFNAME": "cable"}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def over_ssh(ssh_config: Path, place: Path, *addresses: str) -> list[str]:
    """The overrides for a hostfile with these hosts."""
    (place / "hosts").write_text("".join(f"{address} slots=1\n" for address in addresses))
    return ["launcher=hostfile", "launcher.hostfile=hosts", f"launcher.ssh_config={ssh_config}",
            "launcher.connect_seconds=3"]  # fmt: skip


def run_of(place: Path) -> Path:
    [run] = (place / "runs" / "nano").iterdir()
    return run


def steps_of(run: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.long
def test_the_same_command_on_two_hosts_is_one_run_in_one_folder(train_on, hosts, place):
    words = ["launcher=torchrun", "launcher.num_nodes=2",
             f"launcher.rendezvous={hosts[0].address}:29400"]  # fmt: skip
    second = train_on(hosts[1], *words)  # waits for the one that has the address
    time.sleep(1)
    first = train_on(hosts[0], *words)
    said = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "2 process(es) on cpu" in "".join(said)
    assert steps_of(run_of(place)) == [1, 2, 3, 4]


def test_hosts_of_a_file_train_together_and_a_signal_reaches_both(
    train_on, hosts, ssh_config, place
):
    words = [*over_ssh(ssh_config, place, *(host.address for host in hosts)),
             "paths.run_dir=runs/s", "train.steps=16", "train.save_every=0"]  # fmt: skip
    process = train_on(hosts[0], *words)
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if "step  3/" in line or "step  4/" in line:
            process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 75, said
    assert "stopped by SIGUSR1 after step" in said
    again = train_on(hosts[0], *words)
    rest, _ = again.communicate(timeout=120)
    assert again.returncode == 0, rest
    assert "resume: " in rest
    assert steps_of(place / "runs" / "s") == list(range(1, 17))


@pytest.mark.long
def test_hosts_end_by_themselves_when_the_launcher_is_killed(train_on, hosts, ssh_config, place):
    words = over_ssh(ssh_config, place, *(host.address for host in hosts))
    process = train_on(hosts[0], *words, "train.steps=2000", "train.save_every=0")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    assert len(running_in(place)) >= 4
    process.kill()
    deadline = time.monotonic() + 60
    while running_in(place) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running_in(place) == []


def running_in(place: Path) -> list[str]:
    """Processes with launch/train.py that work in place."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if (path / "cwd").readlink() == place:
                words = (path / "cmdline").read_bytes()
                found += [path.name] if b"launch/train.py" in words else []
        except OSError:
            continue
    return found


@pytest.mark.long
def test_what_all_hosts_refuse_is_said_once(train_on, hosts, ssh_config, place):
    words = over_ssh(ssh_config, place, *(host.address for host in hosts))
    process = train_on(hosts[0], *words, "model.vocab_size=256")
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 2, said
    assert said.count("model.vocab_size: got 256") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("wrong", ["10.99.7.77", "no-such-host"])
@pytest.mark.long
def test_a_host_that_cannot_be_reached_is_named_in_time(wrong, train_on, hosts, ssh_config, place):
    begin = time.monotonic()
    process = train_on(hosts[0], *over_ssh(ssh_config, place, hosts[0].address, wrong))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert said.count("error: ") == 1
    assert f"cannot use {wrong} (" in said
    assert time.monotonic() - begin < 15
    assert not (place / "runs").exists()
