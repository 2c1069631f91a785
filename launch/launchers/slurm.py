"""Write the run's batch script and submit it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from launchers.job import Job
from launchers.slurm_script import slurm_script

from moe.config import TrainConfig
from moe.errors import ConfigError
from moe.train.atomic_files import replace_file
from moe.train.metrics import METRICS_FILE, read_metrics
from moe.train.notice import pace_of
from moe.train.redact import redact_texts

SCRIPT_NAME = "job.sbatch"


def start(job: Job) -> int:
    """Submit the run (launcher.submit=false: only write it); say how to follow and cancel it."""
    launcher = job.config.launcher
    if launcher.submit and shutil.which("sbatch") is None:
        raise ConfigError(
            "launcher: got slurm, and there is no sbatch on this machine. Run the command on a "
            "login node of the cluster, or write the script only: launcher.submit=false."
        )
    _refuse_short_notice(job)
    folder, text = folder_of(job), script_text(job)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / SCRIPT_NAME
    replace_file(script, text.encode())
    script.chmod(0o600)  # it says how this user works
    if not launcher.submit:
        print(f"script: {script}\nsubmit it with: sbatch {script}")
        return 0
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    number = done.stdout.strip().partition(";")[0]
    if done.returncode != 0 or not re.fullmatch(r"\d+", number):
        script.unlink()
        for path in missing:
            with contextlib.suppress(OSError):  # somebody put something in it
                path.rmdir()
        raise ConfigError(_refused(done.stderr or done.stdout))
    print(
        f"job: {number}\nlog: {folder / f'job_{number}.log'}\nrun folder: {folder.parent}\n"
        f"cancel it with: scancel {number}\n"
        f"save and queue it again with: scancel --signal=USR1 {number}"
    )
    return 0


def folder_of(job: Job) -> Path:
    """Where script and logs lie: in the run folder, which is one for all starts of the job."""
    return Path(job.config.paths.run_dir).absolute() / "slurm"


def script_text(job: Job) -> str:
    """The batch script as it is submitted; ConfigError where it would hold a secret."""
    _refuse_secrets(job)
    (shown,) = redact_texts([job.config.name], os.environ)
    name = re.sub(r"[^\w.-]+", "-", shown, flags=re.ASCII)
    asked = resources(job.config)
    command = job.command(job.config.paths.run_dir)
    if asked.has_gpus and job.config.parallel.device == "auto":
        command.append("parallel.device=cuda")  # what was asked for shall not stand idle
    return slurm_script(
        job.config.launcher,
        name=name,
        command=command,
        folder=folder_of(job),
        cwd=Path.cwd(),
        cpus_per_task=asked.cpus_per_task,
        gpus_per_node=asked.gpus_per_node,
    )


def _refuse_secrets(job: Job) -> None:
    for name, value in dataclasses.asdict(job.config.launcher).items():
        if isinstance(value, str) and redact_texts([value], os.environ) != [value]:
            raise ConfigError(
                f"launcher.{name}: it holds a secret, and a batch script is a file that stays; "
                "SLURM reads this option from the file. Give a value that is none."
            )
    typed = [*job.command(job.config.paths.run_dir)[2:], *job.config.launcher.extra]
    for argument, shown in zip(typed, redact_texts(typed, os.environ), strict=True):
        if argument != shown:
            key = argument.partition("=")[0].lstrip("+~-")
            raise ConfigError(
                f"{key}: it holds a secret, and a batch script is a file that stays. Name a "
                f"variable of the environment instead, which sbatch takes along: "
                f"{key}='${{oc.env:NAME}}'."
            )


def _refuse_short_notice(job: Job) -> None:
    """A run that goes on must be told of its end as early as its own saves need."""
    given, log = job.config.launcher.signal_seconds, Path(job.config.paths.run_dir) / METRICS_FILE
    if not (given and log.is_file()):
        return
    needed = pace_of(read_metrics(log)).seconds_needed
    if needed > given:
        raise ConfigError(
            f"launcher.signal_seconds: got {given}; going by the last steps and saves in {log}, a "
            f"save after SLURM's signal can take {needed:.0f} s (a step, the end of the save "
            f"before, and the save). Set launcher.signal_seconds={round(1.5 * needed) + 1}, or 0 "
            "to be told nothing."
        )


class Resources(NamedTuple):
    """What the batch script asks for."""

    cpus_per_task: int
    gpus_per_node: int  # 0: not asked for here
    has_gpus: bool  # asked for here or in launcher.extra


def resources(config: TrainConfig) -> Resources:
    """Cores for each rank and GPUs for each node, as the batch script asks for them.

    Without a word about GPUs a cluster gives none, and the run would train on CPUs: so they are
    asked for unless parallel.device=cpu, or launcher.extra asks in its own way.
    """
    launcher = config.launcher
    asks_itself = any(
        option.removeprefix("--").startswith(("gpus", "gres", "tres")) for option in launcher.extra
    )
    gpus = launcher.gpus_per_node
    if gpus is None:
        is_silent = not asks_itself and config.parallel.device != "cpu"
        gpus = launcher.processes_per_node if is_silent else 0
    has_gpus = gpus > 0 or asks_itself
    cpus = launcher.cpus_per_task
    if cpus is None:
        # beside a GPU: the kernels' launches, copies to the host, saves, logs
        cpus = 1 + config.data.num_workers + (3 if has_gpus else 0)
    return Resources(cpus, gpus, has_gpus)


def _refused(answer: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in answer.splitlines()]
    said = "; ".join(line for line in lines if line) or "it gave no job number"
    return (
        f"launcher: sbatch refuses the job: {said}. Change launcher.partition, launcher.time, "
        "launcher.account, ... as it says; `sinfo` lists what this cluster has. Without GPUs: "
        "parallel.device=cpu."
    )
