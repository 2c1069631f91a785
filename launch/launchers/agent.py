"""Torch's elastic agent with our rules: what is started again, what signals do, what is said."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, cast

from launchers.meeting import Meeting
from launchers.rank_exit import (
    FAILED,
    INTERRUPTED,
    SAVED,
    Verdict,
    clear_exits,
    describe_code,
    read_exits,
    verdict,
)
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from moe.launcher_config import LauncherConfig
from moe.train.stop_request import STOP_SIGNALS, is_kept_ignored

_FORWARDED = (*STOP_SIGNALS, signal.SIGINT)
_RUN_ID = "phimoe"  # the store serves one run
# ranks that only followed: ended by the agent, or by their watch because another rank failed
_FOLLOWERS = (-signal.SIGTERM, FAILED)


class _Stopped(Exception):
    """A signal came while no ranks were running."""


class Agent(LocalElasticAgent):
    """Starts this host's ranks again unless they refused their settings or a signal ended them."""

    def __init__(self, spec: WorkerSpec, *, folder: Path) -> None:
        logs = DefaultLogsSpecs(log_dir=str(folder / "logs"))
        super().__init__(spec, logs, exit_barrier_timeout=60)
        self._folder = folder
        self._pids: list[int] = []
        self.stop_signal: signal.Signals | None = None
        self.failure = ""  # of the last start, in words

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Pass a signal on to the ranks, which save and end; a second Ctrl-C kills them."""
        is_second = self.stop_signal is signal.SIGINT and number == signal.SIGINT
        self.stop_signal = signal.Signals(number)
        if not self._pids:
            raise _Stopped
        self._signal_ranks(signal.SIGKILL if is_second else number)

    def _signal_ranks(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                # SIGHUP is the terminal's; ranks know SIGTERM
                os.kill(pid, signal.SIGTERM if number == signal.SIGHUP else number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        clear_exits(self._folder)
        ids = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        self._pids = list(ids.values())
        return ids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)  # pyright: ignore[reportCallIssue]
        self._pids = []

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._pids = []
            self.failure = _first_failure(result.failures)
            ended = verdict(read_exits(self._folder), failed=self.failure)
            if ended.is_final or self.stop_signal is not None:
                self._remaining_restarts = 0
            self._announce(ended)
        elif result.state == WorkerState.SUCCEEDED:
            self._pids, self.failure = [], ""
        return result

    def _announce(self, ended: Verdict) -> None:
        if self._remaining_restarts > 0:
            number = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
            print(
                f"launcher: {ended.message}. All ranks start again from the newest checkpoint "
                f"(restart {number} of {self._worker_group.spec.max_restarts}).",
                file=sys.stderr,
                flush=True,
            )


def run_agent(
    command: list[str], launcher: LauncherConfig, *, meeting: Meeting, folder: Path
) -> Verdict:
    """Run command once for each rank of this host until all ended for good."""
    logging.disable(logging.CRITICAL)  # the agent's own lines; ours say it once
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
    handler = DynamicRendezvousHandler.from_backend(
        _RUN_ID, meeting.store, C10dRendezvousBackend(meeting.store, _RUN_ID),
        launcher.least_nodes, launcher.num_nodes, local_addr=meeting.address,
    )  # fmt: skip
    spec = WorkerSpec(
        role="rank",
        local_world_size=launcher.processes_per_node,
        entrypoint=command[0],
        args=tuple(argument.replace("$", "$$") for argument in command[1:]),  # it knows $macros
        rdzv_handler=handler,
        max_restarts=launcher.max_restarts,
        monitor_interval=0.2,
    )
    agent = Agent(spec, folder=folder)
    before = {
        number: signal.signal(number, agent.on_signal)
        for number in _FORWARDED
        if not is_kept_ignored(number)
    }
    result: RunResult | None = None
    trouble = ""
    try:
        result = cast(RunResult | None, agent.run())
    except _Stopped:
        pass  # a signal or a final exit code ended it: the ranks' own records say which, below
    except RendezvousError as error:
        trouble = _rendezvous_trouble(error, launcher)
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)
        handler.shutdown()
        _let_others_read(launcher)
    return _ended(agent, result, trouble=trouble, folder=folder)


def _ended(agent: Agent, result: RunResult | None, *, trouble: str, folder: Path) -> Verdict:
    told = read_exits(folder)
    is_good = result is not None and not result.is_failed()
    ended = verdict(told, failed="" if is_good else agent.failure or trouble)
    if ended.is_final:
        return ended
    if agent.stop_signal is signal.SIGINT:
        return Verdict(INTERRUPTED, _GO_ON.format("interrupted"))
    if result is None and agent.stop_signal is not None:
        return Verdict(SAVED, _GO_ON.format(f"stopped by {agent.stop_signal.name} before training"))
    if trouble and not told:
        return Verdict(FAILED, trouble)
    if ended.code == FAILED:
        spec = agent._worker_group.spec
        tried = "" if agent.stop_signal else f", after {spec.max_restarts} restart(s)"
        return Verdict(FAILED, _GO_ON.format(f"{ended.message}{tried}"))
    return ended


_GO_ON = "{}. The same command with the same paths.run_dir goes on from the newest checkpoint."


def _first_failure(failures: dict[int, ProcessFailure]) -> str:
    """The rank that failed by itself and first, and how."""
    by_age = sorted(
        failures.items(), key=lambda item: (item[1].exitcode in _FOLLOWERS, item[1].timestamp)
    )
    if not by_age:
        return "the ranks stopped answering"
    rank, failure = by_age[0]
    return f"rank {rank} ended with {describe_code(failure.exitcode)}"


def _rendezvous_trouble(error: RendezvousError, launcher: LauncherConfig) -> str:
    where = f"launcher.rendezvous={launcher.rendezvous}"
    if isinstance(error, RendezvousClosedError):
        return "the ranks of another host ended for good, so these end too; that host says why"
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"fewer than {launcher.least_nodes} hosts came to {where} in time. Start the same "
            "command on every host, or set launcher.min_nodes to train with fewer"
        )
    if isinstance(error, RendezvousConnectionError):
        return f"the host of {where} does not answer any more"
    return f"no rendezvous at {where}: {error}"


def _let_others_read(launcher: LauncherConfig) -> None:
    """The store ends with this process: the other agents must see first that all is over."""
    if launcher.num_nodes > 1:
        time.sleep(2)  # they look about once a second
