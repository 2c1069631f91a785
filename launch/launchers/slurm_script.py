"""The batch script of a run: a plain file to read, keep, change and submit again by hand.

No library between: a script is what clusters document and their operators can debug. One task is
one rank. SLURM sends SIGUSR1 to the ranks before the time is up; they save and end, and the script
asks for the job to be queued again, under the same number and with the same log. Secrets stay in
the environment, which sbatch takes along; a command that holds one is refused. After a rank died
all start again on the same nodes, and only where they fail again soon the nodes are given back.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from launchers.rank_exit import FOLDER_VARIABLE

from moe.launcher_config import LauncherConfig
from moe.parallel.launcher import OWN_LAUNCHER_VARIABLE
from moe.train.notice import NOTICE_VARIABLE

_SOON_SECONDS = 600  # ranks that fail twice within it are given other nodes
_AFTER = Path(__file__).resolve().parent.parent / "after_srun.py"


def slurm_script(
    launcher: LauncherConfig,
    *,
    name: str,
    command: list[str],
    folder: Path,
    cwd: Path,
    cpus_per_task: int,
    gpus_per_node: int,
) -> str:
    """The text of the script; folder: absolute, for the log and for what ranks say at their end."""
    options = _options(
        launcher, name=name, folder=folder, cpus_per_task=cpus_per_task, gpus_per_node=gpus_per_node
    )
    return "\n".join(
        (
            "#!/usr/bin/env bash",
            "# Written by launch/train.py. The same run again, or on: sbatch THIS_FILE",
            *(f"#SBATCH --{option}" for option in options),
            _BODY.format(
                cwd=shlex.quote(str(cwd)),
                folder=shlex.quote(str(folder)),
                variable=FOLDER_VARIABLE,
                max_restarts=launcher.max_restarts,
                soon=_SOON_SECONDS,
                notice=NOTICE_VARIABLE,
                launcher=OWN_LAUNCHER_VARIABLE,
                signal_seconds=launcher.signal_seconds,
                python=shlex.quote(sys.executable),
                after=shlex.quote(str(_AFTER)),
                command=shlex.join(command),
            ),
        )
    )


def _options(
    launcher: LauncherConfig, *, name: str, folder: Path, cpus_per_task: int, gpus_per_node: int
) -> list[str]:
    options = [
        f"job-name={launcher.job_name or name}",
        f"nodes={launcher.num_nodes}",
        f"ntasks-per-node={launcher.processes_per_node}",
        f"cpus-per-task={cpus_per_task}",
        f"output={log_pattern(folder)}",
        "open-mode=append",
        "export=ALL",
        "requeue",
    ]
    if gpus_per_node:
        options.append(f"gpus-per-node={gpus_per_node}")
    if launcher.signal_seconds:
        options.append(f"signal=USR1@{launcher.signal_seconds}")
    for key in ("time", "partition", "account", "qos", "constraint"):
        value = getattr(launcher, key)
        if value is not None:
            options.append(f"{key}={value}")
    return options + [option.removeprefix("--") for option in launcher.extra]


def log_pattern(folder: Path) -> str:
    """The log of a job, as sbatch takes it: %j is the number of the job, and %% a percent sign."""
    escaped = str(folder).replace("%", "%%")
    return shlex.quote(f"{escaped}/job_%j.log") if " " in escaped else f"{escaped}/job_%j.log"


_BODY = r"""
set -u
cd {cwd} || exit 70
folder={folder}
failures="$folder/job_${{SLURM_JOB_ID}}_failures"

# the first node of the allocation serves the ranks' meeting; jobs that share it use other ports
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${{address:-$first}}"
export MASTER_PORT="${{MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}}"
export WORLD_SIZE="$SLURM_NTASKS"
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}"
export {notice}={signal_seconds}
export {launcher}=1 # a rank whose parent, the step's daemon, is gone ends

state() {{ squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null; }}
# SLURM signals the ranks by itself; these are for signals to the whole job (scancel --full)
for name in TERM USR1 USR2; do trap "kill -$name \"\$srun\" 2>/dev/null" $name; done

start=0
while :; do
  export {variable}="$folder/job_${{SLURM_JOB_ID}}_start_${{SLURM_RESTART_COUNT:-0}}_$start"
  began=$SECONDS
  # one task is one rank; exec, so that signals reach Python itself. srun ends all when one fails:
  # ranks that saved after a signal leave with 0 and are not waited for in vain
  srun --kill-on-bad-exit=1 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec "$@"' rank \
    {command} </dev/null &
  srun=$!
  # a trap ends wait early
  while wait "$srun"; kill -0 "$srun" 2>/dev/null; do :; done
  wait "$srun"
  code=$?
  {python} {after} "${variable}" "$code"
  code=$?
  case $code in
    75) again=1 ;;
    0 | 2 | 3 | 130) ;;
    *)
      echo "$code" >>"$failures"
      count=$(wc -l <"$failures")
      if [ "$count" -le {max_restarts} ] && [ "$(state)" = RUNNING ]; then
        # a place in the queue costs more than a start; but a broken node fails soon each time
        if [ "$start" = 0 ] || [ $((SECONDS - began)) -ge {soon} ]; then
          start=$((start + 1))
          echo "launcher: all ranks start again from the newest checkpoint, on the same nodes" \
            "(restart $count of {max_restarts})"
          continue
        fi
        again=1
      fi
      ;;
  esac
  break
done
# a job that was cancelled stays cancelled
if [ "${{again:-0}}" = 1 ] && [ "$(state)" = RUNNING ]; then
  echo "launcher: job $SLURM_JOB_ID is queued again and goes on from its newest checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
