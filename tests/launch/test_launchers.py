"""One command, any launcher: one run folder, one message, one exit code, nothing left running."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from launchers.hosts_file import read_hosts
from launchers.job import Job, override, without_launcher
from launchers.rank_exit import FAILED, MISTAKE, SAVED, RankExit, Verdict, verdict
from launchers.slurm import script_text

from moe.config import ParallelConfig, PathsConfig, TrainConfig
from moe.errors import ConfigError
from moe.launcher_config import LauncherConfig
from moe.parallel.launcher import OWN_LAUNCHER_VARIABLE
from moe.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TWO = ["launcher=torchrun", "launcher.processes_per_node=2"]
# long enough to be interrupted, nothing that only costs time
QUIET = ["train.micro_batch_size=4", "train.evaluate_every=0", "train.evaluate_tokens=500",
         "train.sample_tokens=0"]  # fmt: skip


@pytest.fixture
def train(environment, workplace, place) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start train(*overrides): launch/train.py with both outputs in one; ended with the test."""
    started = []

    def start(*overrides: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        keys = {a.partition("=")[0] for a in overrides}
        usual = [a for a in workplace.train if a != "parallel=plain"]
        usual = [a for a in [*usual, *QUIET] if a.partition("=")[0] not in keys]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "train.py"), *usual, *overrides],
            cwd=place, env=environment | (env or {}), text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """What the process says up to a line that has pattern."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(f"it never said {pattern}: {said}")


def ranks_below(folder: Path) -> dict[int, str]:
    """Process ids of the ranks that work in folder, with their RANK; guardians left out."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            words = (path / "cmdline").read_bytes()
            is_here = (path / "cwd").readlink() == folder
        except OSError:
            continue
        rank = [v.removeprefix(b"RANK=").decode() for v in variables if v.startswith(b"RANK=")]
        if rank and is_here and b"launch/train.py" in words:
            found[int(path.name)] = rank[0]
    return found


def wait_until_gone(folder: Path, *, seconds: float) -> dict[int, str]:
    deadline = time.monotonic() + seconds
    while ranks_below(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return ranks_below(folder)


def steps_of(run: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]


def only_run(place: Path) -> Path:
    [run] = (place / "runs" / "nano").iterdir()
    return run


# what ranks are given


@pytest.mark.parametrize(
    "text", ["runs/a", "runs/a b", "it's", "a=b,c", "[x]{y}", "50%", "~/x", "a\\'b", "null", "1e3"]
)
def test_any_run_folder_survives_the_grammar_of_the_command_line(text: str) -> None:
    [parsed] = OverridesParser.create().parse_overrides([override("paths.run_dir", text)])
    assert parsed.value() == text


def test_ranks_get_the_users_words_but_for_the_launchers() -> None:
    typed = ["--config-dir", "my", "experiment=nano", "launcher=slurm", "++launcher.time=1:00",
             "paths.run_dir=old", "seed=3"]  # fmt: skip
    job = Job(TrainConfig(), without_launcher(typed))
    words = job.command("runs/new")[2:]
    assert words == [
        "--config-dir", "my", "experiment=nano", "seed=3", "launcher=local",
        "paths.run_dir='runs/new'",
    ]  # fmt: skip


# what ranks say


@pytest.mark.parametrize(
    ("exits", "failed", "expected"),
    [
        ([], "", Verdict(0, "")),
        ([RankExit(0, 75, "told"), RankExit(1, 75, "got SIGTERM")], "", Verdict(75, "got SIGTERM")),
        ([RankExit(0, 70, ""), RankExit(1, 2, "wrong")], "rank 0 ended", Verdict(2, "wrong")),
        ([RankExit(0, 75, "stopped"), RankExit(1, 3, "nan")], "rank 1", Verdict(3, "nan")),
        ([RankExit(0, 75, "stopped")], "rank 1 died", Verdict(70, "rank 1 died")),
        ([RankExit(1, 70, "so")], "", Verdict(70, "rank 1 ended with exit code 70: so")),
    ],
    ids=["done", "saved", "mistake_outweighs", "gave_up", "one_died_while_saving", "hung"],
)  # fmt: skip
def test_one_verdict_comes_of_what_all_ranks_said(exits, failed, expected) -> None:
    assert verdict(exits, failed=failed) == expected


def test_only_ends_that_would_come_again_are_final() -> None:
    assert Verdict(MISTAKE, "").is_final
    assert not Verdict(SAVED, "").is_final
    assert not Verdict(FAILED, "").is_final


# hostfiles


def test_a_hostfile_may_have_comments_and_blank_lines(tmp_path) -> None:
    (tmp_path / "hosts").write_text("# ours\n\nnode01 slots=8\nme@10.0.0.2 slots = 8 # new\n")
    hosts = read_hosts(str(tmp_path / "hosts"))
    assert (hosts.names, hosts.slots) == (("node01", "me@10.0.0.2"), 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["names no host", "host slots=N"]),
        ("node01\n", ["line 1: got 'node01'", "node01 slots=8"]),
        ("a slots=2\nb slots=0\n", ["line 2: got 'b slots=0'", "at least 1"]),
        ("a slots=2\na slots=2\n", ["line 2: 'a' is there twice"]),
        ("a slots=2\nb slots=4\n", ["different numbers of slots (a 2, b 4)"]),
        ("-oProxyCommand=x slots=1\n", ["line 1: got '-oProxyCommand=x slots=1'"]),
        ("[fe80::1] slots=1\n", ["line 1: got '[fe80::1] slots=1'", "a name", "/etc/hosts"]),
        ("fe80::1 slots=1\n", ["line 1: got 'fe80::1 slots=1'", "a name", "/etc/hosts"]),
        ("node01:2222 slots=1\n", ["line 1: got 'node01:2222 slots=1'", "launcher.ssh_config"]),
        (None, ["cannot read", "No such file"]),
    ],
    ids=[
        "empty",
        "no_slots",
        "zero",
        "twice",
        "uneven",
        "an_option_for_ssh",
        "ipv6_in_brackets",
        "ipv6",
        "a_port",
        "missing",
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(text, words, tmp_path) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_hosts(str(path))
    assert [word for word in ["launcher.hostfile", *words] if word not in str(raised.value)] == []


# the batch script


def test_the_batch_script_is_a_script_and_says_what_was_configured(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-a-key")
    launcher = LauncherConfig(
        name="slurm", num_nodes=2, processes_per_node=8, gpus_per_node=8, cpus_per_task=12,
        time="12:00:00", partition="h100", account="moe", qos="high", constraint="ib&nvme",
        extra=("--exclusive", "mem=64G"), signal_seconds=300, max_restarts=7,
    )  # fmt: skip
    job = Job(
        TrainConfig(name="a b;c", launcher=launcher), ("train.sample_prompt='a; rm -r $HOME'",)
    )
    text = script_text(job)
    options = re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)
    assert {
        "job-name=a-b-c", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12",
        "time=12:00:00", "partition=h100", "account=moe", "qos=high", "constraint=ib&nvme",
        "exclusive", "mem=64G", "signal=USR1@300", "requeue", "open-mode=append",
    } <= set(options)  # fmt: skip
    assert "-le 7 ]" in text
    assert f"export {OWN_LAUNCHER_VARIABLE}=1" in text  # ranks look whether their parent is there
    assert "canary" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    # the words of the command reach Python as they are: a shell reads the script
    line = next(line for line in text.splitlines() if "train.py" in line and "SBATCH" not in line
                and not line.startswith("#"))  # fmt: skip
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line.removesuffix(' </dev/null &')}"],
        capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    assert "train.sample_prompt='a; rm -r $HOME'" in words


def test_a_cluster_is_left_its_defaults_where_nothing_is_configured() -> None:
    text = script_text(
        Job(
            TrainConfig(
                launcher=LauncherConfig(name="slurm", signal_seconds=0),
                parallel=ParallelConfig(device="cpu"),
            ),
            (),
        )
    )
    for word in ("--time", "--partition", "--gpus", "--signal", "--account"):
        assert f"#SBATCH {word}" not in text


@pytest.mark.parametrize(
    ("launcher", "device", "options", "is_demanded"),
    [
        ({}, "auto", ["gpus-per-node=8", "cpus-per-task=4"], True),
        ({}, "cuda", ["gpus-per-node=8", "cpus-per-task=4"], False),
        ({}, "cpu", ["cpus-per-task=1"], False),
        ({"gpus_per_node": 0}, "auto", ["cpus-per-task=1"], False),
        ({"extra": ("gpus-per-task=1",), "cpus_per_task": 9}, "auto",
         ["gpus-per-task=1", "cpus-per-task=9"], True),
        ({"extra": ("gres=gpu:a100:8",)}, "auto", ["gres=gpu:a100:8", "cpus-per-task=4"], True),
    ],
)  # fmt: skip
def test_the_batch_script_asks_for_gpus_unless_they_are_not_wanted(
    launcher, device, options, is_demanded
) -> None:
    config = TrainConfig(
        launcher=LauncherConfig(name="slurm", processes_per_node=8, **launcher),
        parallel=ParallelConfig(device=device),
    )
    text = script_text(Job(config, ()))
    asked = [o for o in re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE) if "gpu" in o
             or "cpus-per" in o]  # fmt: skip
    assert sorted(asked) == sorted(options)
    assert ("parallel.device=cuda" in text) == is_demanded


@pytest.mark.parametrize(
    ("ends", "code", "starts", "is_queued"),
    [
        ([9, 0], 0, 2, False),  # a dead rank: again on the same nodes
        ([9, 9], 70, 2, True),  # soon again: on others
        ([9, 0], 70, 1, False),  # never again
        ([75], 75, 1, True),
        ([2], 2, 1, False),
        ([130], 130, 1, False),
    ],
)
def test_the_batch_script_starts_ranks_again_where_they_are_then_elsewhere(
    ends, code, starts, is_queued, tmp_path, monkeypatch
) -> None:
    """The script itself, with programs of SLURM's names that note what they are asked."""
    monkeypatch.chdir(tmp_path)
    programs = {
        # the code of each start is the next line of ends; a rank that ends by itself says why
        "srun": "n=$(wc -l <calls); echo srun >>calls; code=$(sed -n $((n + 1))p ends)\n"
                "case $code in 0 | 9) exit $code ;; esac\nmkdir -p $PHIMOE_EXIT_FOLDER\n"
                'echo "{\\"rank\\": 0, \\"code\\": $code, \\"message\\": \\"why\\"}" '
                ">$PHIMOE_EXIT_FOLDER/rank_0.json",
        "scontrol": '[ "$1" != requeue ] || touch queued; echo node1',
        "squeue": "echo RUNNING",
    }  # fmt: skip
    for name, body in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    (tmp_path / "calls").touch()
    (tmp_path / "ends").write_text("".join(f"{end}\n" for end in ends))
    restarts = 0 if (starts, code) == (1, 70) else 3
    config = TrainConfig(
        launcher=LauncherConfig(name="slurm", max_restarts=restarts),
        paths=PathsConfig(run_dir=str(tmp_path)),
    )
    (tmp_path / "slurm").mkdir()
    done = subprocess.run(
        ["bash"], input=script_text(Job(config, ())), text=True, capture_output=True,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
             "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NTASKS": "1",
             "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert (tmp_path / "calls").read_text().count("srun") == starts
    assert (tmp_path / "queued").exists() == is_queued
    assert ("on the same nodes (restart 1 of 3)" in done.stdout) == (starts == 2)


def test_a_run_whose_saves_take_longer_than_the_notice_is_refused(
    command, workplace, place
) -> None:
    log = shutil.copytree(workplace.folder / "runs" / "a", place / "runs" / "s") / "metrics.jsonl"
    records = [{"kind": "train", "step": 4, "step_seconds": 20.0},
               {"kind": "checkpoint", "step": 4, "checkpoint/write_seconds": 90.0}]  # fmt: skip
    with log.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    words = [*workplace.train, "launcher=slurm", "launcher.submit=false", "paths.run_dir=runs/s"]
    done = command("train", *words, cwd=place)
    assert done.returncode == 2
    assert "launcher.signal_seconds: got 120; going by" in done.stderr
    assert "can take 200 s" in done.stderr
    done = command("train", *words, "launcher.signal_seconds=301", cwd=place)
    assert done.returncode == 0, done.stderr


# the command, before anything starts


@pytest.fixture(scope="module")
def poison(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("poison")
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')")
    return folder


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["launcher=torchrun", "launcher.processes_per_node=3"],
         ["train.batch_size: got 8", "3 ranks"]),
        (["launcher=slurm", "launcher.num_nodes=3"], ["train.batch_size: got 8", "3 ranks"]),
        (["launcher=slurm", "launcher.tme=3"], ["launcher.tme: unknown", "'launcher.time'"]),
        (["launcher=slurm", "paths.data_dir=nowhere"], ["paths.data_dir: nowhere does not exist"]),
        (["launcher=slurm"], ["no sbatch on this machine", "launcher.submit=false"]),
        (["launcher=hostfile"], ["launcher.hostfile: not given"]),
        (["launcher=hostfile", "launcher.hostfile=nope"], ["launcher.hostfile: cannot read"]),
        (["launcher=hostfile", "launcher.hostfile=hosts"], ["no ssh on this machine"]),
        (["launcher=torchrun", "launcher.num_nodes=2", "launcher.rendezvous=a:1",
          "launcher.min_nodes=1", "train.micro_batch_size=8"], ["got 8", "2 ranks"]),
    ],
    ids=["batch", "batch_of_slurm", "misspelt", "data", "no_sbatch", "no_hostfile", "hostfile",
         "no_ssh", "elastic_batch"],
)  # fmt: skip
def test_a_launch_that_cannot_be_is_refused_at_once_and_leaves_nothing(
    overrides, words, command, environment, workplace, place, poison
):
    (place / "hosts").write_text("localhost slots=1\n")
    before = sorted(place.rglob("*"))
    path = os.pathsep.join((str(poison), environment["PYTHONPATH"]))
    usual = [a for a in workplace.train if a != "parallel=plain"]
    done = command(
        "train", *usual, *overrides, cwd=place, env={"PYTHONPATH": path, "PATH": str(poison)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == []
    assert sorted(place.rglob("*")) == before


def test_a_launcher_below_another_one_is_refused(command, workplace, place):
    done = command("train", *workplace.train, *TWO, cwd=place, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.returncode == 2
    assert "launcher=local there" in done.stderr


def test_a_script_can_be_written_without_a_cluster(command, workplace, place):
    done = command(
        "train", *workplace.train, "launcher=slurm", "launcher.submit=false",
        "paths.run_dir=runs/s", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = place / "runs" / "s" / "slurm" / "job.sbatch"
    assert f"script: {script}" in done.stdout
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ([], ["plan: ", " on 1 node, CPU", "fits: ", "launcher: local, 1 host(s)"]),
        (TWO, ["2 process(es) each", "launcher=local", "paths.run_dir="]),
        (["launcher=slurm"], ["#SBATCH --nodes=1", "srun "]),
        (["launcher=hostfile", "launcher.hostfile=hosts"],
         ["on a: ", "on b: ", "launcher.node_rank=1", "launcher.rendezvous=a:29400"]),
    ],
    ids=["local", "torchrun", "slurm", "hostfile"],
)  # fmt: skip
def test_a_dry_run_shows_the_plan_and_starts_nothing(launcher, words, command, workplace, place):
    (place / "hosts").write_text("a slots=1\nb slots=1\n")
    before = sorted(place.rglob("*"))
    usual = [a for a in workplace.train if a != "parallel=plain"]
    done = command("train", "--dry-run", *usual, *QUIET, *launcher, cwd=place)
    assert done.returncode == 0, done.stderr
    assert [word for word in words if word not in done.stdout] == []
    assert ("that a GPU has" in done.stdout) == (launcher not in ([], TWO))
    assert sorted(place.rglob("*")) == before


# torchrun, with real ranks


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_the_run_ends_as_one(train, place):
    process = train(*TWO, "train.steps=24", "logging=offline", "train.save_every=4")
    read_until(process, r"step +([6-9]|1\d)/")
    [victim] = [pid for pid, rank in ranks_below(place).items() if rank == "1"]
    os.kill(victim, signal.SIGKILL)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0, rest
    assert "launcher: rank 1 ended with signal 9 (SIGKILL)" in rest
    assert "(restart 1 of 3)" in rest
    assert "resume: " in rest
    run = only_run(place)
    assert steps_of(run) == list(range(1, 25))
    assert len({p.name.rpartition("-")[2] for p in run.glob("wandb/**/offline-run-*")}) == 1
    assert (run / "run.png").is_file()
    assert wait_until_gone(place, seconds=5) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("SIGTERM", marks=pytest.mark.long), "SIGUSR1"])
def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on(name, train, place):
    words = (*TWO, "train.steps=12", "train.save_every=0", "paths.run_dir=runs/s")
    process = train(*words)
    read_until(process, r"step +[3-9]/")
    process.send_signal(signal.Signals[name])
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 75, rest
    assert rest.count(f"stopped by {name} after step") == 1
    assert "error" not in rest
    assert "Traceback" not in rest
    assert wait_until_gone(place, seconds=5) == {}
    again = train(*words)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "resume: " in said
    assert steps_of(place / "runs" / "s") == list(range(1, 13))


@pytest.mark.slow
def test_what_only_ranks_can_find_wrong_is_said_once_and_not_tried_again(train, place):
    process = train(*TWO, "model.vocab_size=256")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert said.count("model.vocab_size: got 256") == 1
    assert said.count("error: ") == 1
    assert "restart" not in said
    assert "Traceback" not in said
    assert wait_until_gone(place, seconds=5) == {}


@pytest.mark.long
def test_ctrl_c_ends_all_ranks_with_one_line(train, place):
    process = train(*TWO, "train.steps=500")
    read_until(process, r"step +\d+/")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert rest.count("stopped by SIGINT after step") == 1
    assert "Traceback" not in rest
    assert wait_until_gone(place, seconds=5) == {}


@pytest.mark.long
def test_ranks_save_and_end_when_their_launcher_is_killed(train, place):
    process = train(*TWO, "train.steps=2000", "train.save_every=0", "paths.run_dir=runs/s")
    read_until(process, r"step +\d+/")
    assert len(ranks_below(place)) >= 2
    process.kill()
    assert wait_until_gone(place, seconds=40) == {}
    assert list((place / "runs" / "s" / "checkpoints").glob("step_*/manifest.json"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port at which somebody listens and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("node_rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_port_of_another_program_is_refused_on_every_host_in_time(
    node_rank, taken_port, train, place
):
    begin = time.monotonic()
    process = train(
        "launcher=torchrun", "launcher.num_nodes=2", f"launcher.node_rank={node_rank}",
        f"launcher.rendezvous=127.0.0.1:{taken_port}",
    )  # fmt: skip
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert said.count("error: ") == 1
    assert f"cannot meet at 127.0.0.1:{taken_port}" in said
    assert "Give a free port" in said
    assert time.monotonic() - begin < 15 + 5  # the machine may be busy with other tests
    assert not (place / "runs").exists()


@pytest.mark.long
def test_hosts_with_other_settings_do_not_train_together(train, taken_port, place):
    port = taken_port - 1 if taken_port > 1025 else taken_port + 1
    both = ["launcher=torchrun", "launcher.num_nodes=2", f"launcher.rendezvous=127.0.0.1:{port}"]
    first = train(*both, "launcher.node_rank=0", "optim.lr=1e-3")
    time.sleep(1)
    second = train(*both, "launcher.node_rank=1", "optim.lr=2e-3")
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 2, said
    assert "different: optim." in said
    first.send_signal(signal.SIGTERM)
    rest, _ = first.communicate(timeout=60)
    assert first.returncode == 75, rest
    assert "before training" in rest
    assert not (place / "runs").exists()
