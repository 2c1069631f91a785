"""Start a checked training run with the launcher that its configuration names."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Iterator

from launchers.job import Job

from moe.config import TrainConfig
from moe.errors import ConfigError

_MODULES = {"hostfile": "hostfile", "slurm": "slurm", "torchrun": "torchrun"}


def check_launch(job: Job) -> None:
    """Raise UserError for a layout that cannot be, before anything is submitted or started."""
    launcher = job.config.launcher
    num_nodes, per_node, least = layout(job.config)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"launcher: got {launcher.name} in a process that was itself started as one of "
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}; allowed: launcher=local there. Start it "
            "without torchrun or srun around it."
        )
    for count in range(least, num_nodes + 1):
        job.config.check_processes(count * per_node)


def layout(config: TrainConfig) -> tuple[int, int, int]:
    """Hosts, processes on each, and the fewest hosts that training may go on with."""
    launcher = config.launcher
    if launcher.name == "local":
        return 1, 1, 1
    if launcher.name == "hostfile":
        from launchers.hostfile import hosts_of

        hosts = hosts_of(launcher)
        num_nodes = len(hosts.names)
        return num_nodes, hosts.slots, min(launcher.min_nodes or num_nodes, num_nodes)
    least = launcher.least_nodes if launcher.name == "torchrun" else launcher.num_nodes
    return launcher.num_nodes, launcher.processes_per_node, least


def start(job: Job) -> int:
    """Run or submit the job; return the exit code. Raises UserError where it cannot be."""
    check_launch(job)
    module = importlib.import_module(f"launchers.{_MODULES[job.config.launcher.name]}")
    return module.start(job)


def describe(job: Job) -> Iterator[str]:
    """What would be started and what it needs, as lines for the terminal."""
    from moe.plan.report import cpu_plan_lines, plan_lines

    num_nodes, per_node, _ = layout(job.config)
    world_size, is_here = num_nodes * per_node, job.config.launcher.name in ("local", "torchrun")
    if _is_on_cpus(job.config, is_here=is_here):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if is_here else None
        yield from cpu_plan_lines(
            job.config, world_size=world_size, per_host=per_node, memory_bytes=memory
        )
    else:
        yield from plan_lines(job.config, world_size=world_size, gpus_per_node=per_node)
    yield ""
    launcher = job.config.launcher
    yield f"launcher: {launcher.name}, {num_nodes} host(s) with {per_node} process(es) each"
    if launcher.name == "slurm":
        from launchers.slurm import folder_of, script_text

        yield f"batch script, to be written to {folder_of(job)}:"
        yield from script_text(job).splitlines()
    elif launcher.name == "hostfile":
        from launchers.hostfile import command_on, hosts_of

        hosts = hosts_of(launcher)
        for number, name in enumerate(hosts.names):
            yield f"on {name}: {shlex.join(command_on(job, hosts, number))}"
    else:
        yield f"each process: {shlex.join(job.command(job.config.paths.run_dir))}"


def _is_on_cpus(config: TrainConfig, *, is_here: bool) -> bool:
    """Whether the ranks will run on CPUs, as far as this machine can tell."""
    if config.parallel.device != "auto" or not is_here:
        return config.parallel.device == "cpu"
    import torch

    return not torch.cuda.is_available()
