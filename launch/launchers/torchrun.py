"""Ranks of this host by torch's elastic agent, alone or together with other hosts' agents.

Every host runs the same command. The hosts meet at launcher.rendezvous, agree on one run folder and
compare their settings; each then starts its ranks, and all start again when one rank fails.

The agent is used through its classes rather than as the program torchrun: that one makes 1 of every
exit code, prints a table, restarts ranks that refused their settings, and ends them 30 seconds
after a signal, however long a save takes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.job import Job
from launchers.rank_exit import DONE, SAVED, Verdict, environment_of_ranks
from mistakes import stop

from moe.errors import ConfigError

if TYPE_CHECKING:
    from launchers.meeting import Meeting

_AGREED = "phimoe/agreed"


def start(job: Job) -> int:
    """Start the ranks of this host and stay until they have ended for good."""
    from launchers.agent import run_agent
    from launchers.meeting import meet

    launcher = job.config.launcher
    meeting = meet(launcher)
    run_dir = _agree(job, meeting)
    with tempfile.TemporaryDirectory(prefix="phimoe_") as folder:
        for_ranks = environment_of_ranks(Path(folder), num_ranks=launcher.processes_per_node)
        os.environ.update(for_ranks)  # the agent has no other way to hand it on
        try:
            ended = run_agent(job.command(run_dir), launcher, meeting=meeting, folder=Path(folder))
        finally:
            for name in for_ranks:
                del os.environ[name]  # this process is no rank
    return _tell(ended)


def _tell(ended: Verdict) -> int:
    if ended.code == SAVED:
        print(f"launcher: {ended.message}", flush=True)
    elif ended.code != DONE:
        stop(ended.message, ended.code)
    return ended.code


def _agree(job: Job, meeting: Meeting) -> str:
    """Return the run folder of the host that came first; refuse to train with other settings."""
    mine = {"run_dir": job.config.paths.run_dir, "settings": _digests(job)}
    first = json.loads(meeting.store.compare_set(_AGREED, "", json.dumps(mine)))
    differing = [name for name, digest in _digests(job).items()
                 if first["settings"].get(name) != digest]  # fmt: skip
    if differing:
        raise ConfigError(
            f"launcher: this host's settings are not those of the host that came first to the "
            f"rendezvous; different: {', '.join(differing)}. Give the same command on every host; "
            "only launcher.node_rank may differ."
        )
    return first["run_dir"]


def _digests(job: Job) -> dict[str, str]:
    """A digest of each group of settings: values themselves stay on their host."""
    values = dataclasses.asdict(job.config)
    del values["launcher"]["node_rank"]
    if not job.names_run_dir:
        del values["paths"]["run_dir"]
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for name, value in values.items()
    }
