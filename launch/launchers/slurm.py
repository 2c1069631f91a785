"""Write the run's batch script and submit it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from launchers.job import Job
from launchers.slurm_script import slurm_script

from moe.errors import ConfigError
from moe.train.atomic_files import replace_file
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
    return slurm_script(
        job.config.launcher,
        name=name,
        command=job.command(job.config.paths.run_dir),
        folder=folder_of(job),
        cwd=Path.cwd(),
    )


def _refuse_secrets(job: Job) -> None:
    typed = [*job.command(job.config.paths.run_dir)[2:], *job.config.launcher.extra]
    for argument, shown in zip(typed, redact_texts(typed, os.environ), strict=True):
        if argument != shown:
            key = argument.partition("=")[0].lstrip("+~-")
            raise ConfigError(
                f"{key}: it holds a secret, and a batch script is a file that stays. Name a "
                f"variable of the environment instead, which sbatch takes along: "
                f"{key}='${{oc.env:NAME}}'."
            )


def _refused(answer: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in answer.splitlines()]
    said = "; ".join(line for line in lines if line) or "it gave no job number"
    return (
        f"launcher: sbatch refuses the job: {said}. Change launcher.partition, launcher.time, "
        "launcher.account, ... as it says; `sinfo` lists what this cluster has."
    )
