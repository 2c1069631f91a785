"""Sweeps: Hydra's run side by side in W&B's table, and W&B's own agent starts real runs."""

from __future__ import annotations

import json
import os
import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from wandb_file import history, last_summary, leave_the_user_out, of_kind, only_wandb_file

from moe.config import TrainConfig
from moe.config_from_dict import known_keys

wandb = pytest.importorskip("wandb")

ROOT = Path(__file__).parents[3]
CONF = ROOT / "conf"
SWEEPS = sorted((CONF / "sweep").glob("*.yaml"))
SHORT = [
    "parallel=plain", "data.name=tiny", "tokenizer.vocab_size=512", "train.steps=3",
    "train.evaluate_every=3", "train.save_every=3", "train.precision=float32",
    "optim.warmup_steps=1", "train.sample_tokens=0",
]  # fmt: skip


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    leave_the_user_out(tmp_path / "home", monkeypatch)
    yield tmp_path / "home"
    wandb.teardown()


def as_dict(path: Path) -> dict[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(loaded, dict)
    return loaded  # type: ignore[return-value]


def is_option_or_key(name: str, value: str) -> bool:
    return (CONF / name / f"{value}.yaml").is_file() or name in known_keys(TrainConfig)


def test_two_jobs_of_a_sweep_are_told_apart_in_their_folders_and_in_wandb(
    command: Any, workplace: Any, tmp_path: Path
) -> None:
    place = workplace.copy(tmp_path).folder
    done = command(
        "train", "-m", "sweep=routers", "experiment=nano", *SHORT, "logging=offline",
        "router=sparsemixer,topk_renormalised", "seed=1", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [sweep] = (place / "runs" / "nano").iterdir()
    wanted = {
        "0_router-sparsemixer_seed-1": ("sparsemixer", False),
        "1_router-topk_renormalised_seed-1": ("topk_renormalised", True),
    }
    assert {folder.name for folder in sweep.iterdir()} == set(wanted)
    for folder, (arm, renormalise) in wanted.items():
        config = json.loads((sweep / folder / "config.json").read_bytes())
        assert config["router"]["renormalise"] is renormalise
        run, *_ = of_kind(only_wandb_file(sweep / folder), "run")
        assert (run.run_group, run.job_type) == ("sweep_routers", arm)
        assert run.display_name == f"nano {arm} seed 1"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_sweep_file_is_an_option_or_of_a_key(path: Path) -> None:
    params = as_dict(path)["hydra"]["sweeper"]["params"]
    assert len(params) > 1
    for name, values in params.items():
        assert len(str(values).split(",")) > 1, "a sweep over one value is none"
        for value in str(values).split(","):
            assert is_option_or_key(name, value), f"{name}={value}"


def test_the_wandb_sweep_asks_for_what_train_can_be_told() -> None:
    sweep = as_dict(ROOT / "launch" / "wandb_sweep.yaml")
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"]["goal"] in ("minimize", "maximize")
    assert (ROOT / sweep["program"]).is_file()
    assert "${args_no_hyphens}" in sweep["command"], "Hydra's overrides have no dashes"
    for name, drawn in sweep["parameters"].items():
        assert set(drawn) in ({"values"}, {"distribution", "min", "max"})
        for value in drawn.get("values", [drawn.get("min"), drawn.get("max")]):
            assert is_option_or_key(name, value), f"{name}={value}"
        if "min" in drawn:
            assert 0 < drawn["min"] < drawn["max"], "its logarithm is drawn"


def test_wandbs_own_agent_starts_runs_with_the_values_it_draws(
    workplace: Any, environment: dict[str, str], tmp_path: Path, own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from wandb.wandb_agent import Agent

    place = workplace.copy(tmp_path / "place").folder
    (place / "launch").symlink_to(ROOT / "launch")
    monkeypatch.chdir(place)
    python = str(Path(sys.executable).parent)
    for name, value in {
        "PATH": f"{python}{os.pathsep}{environment['PATH']}", "WANDB_SWEEP_ID": "sweep1",
        "PYTHONPATH": environment["PYTHONPATH"], "OMP_NUM_THREADS": "1",
        # the agent sets these two; named here so that they are taken back
        "WANDB_RUN_ID": "none", "WANDB_SWEEP_PARAM_PATH": "none",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    sweep = as_dict(ROOT / "launch" / "wandb_sweep.yaml")
    agent = Agent(api=None, queue=queue.Queue(), sweep_id="sweep1")
    command = ["logging=offline" if c == "logging=online" else c for c in sweep["command"]]
    agent._sweep_command = [*command[:-1], *SHORT, command[-1]]
    drawn = {
        "r1": {"router": "topk_renormalised", "router.balance_coef": 0.0625, "optim.lr": 0.004,
               "seed": 2},
        "r2": {"router": "topk", "router.balance_coef": 0.125, "optim.lr": 0.001, "seed": 0},
    }  # fmt: skip
    for run_id, values in drawn.items():
        args = {name: {"value": value} for name, value in values.items()}
        agent._command_run({"run_id": run_id, "program": sweep["program"], "args": args})
        assert agent._run_processes[run_id].wait() == 0
    for run_id, values in drawn.items():
        run_dir = place / "runs" / "wandb_sweep" / run_id
        config = json.loads((run_dir / "config.json").read_bytes())
        assert config["router"]["name"] == "topk"
        assert config["router"]["renormalise"] is (run_id == "r1")
        assert config["router"]["balance_coef"] == values["router.balance_coef"]
        assert config["optim"]["lr"] == values["optim.lr"]
        assert config["seed"] == values["seed"]
        path = only_wandb_file(run_dir)
        run, *_ = of_kind(path, "run")
        assert (run.run_id, run.sweep_id, run.job_type) == (run_id, "sweep1", "sweep")
        shown = {u.key: json.loads(u.value_json) for u in run.config.update}
        assert {name: shown[name] for name in values} == values
        assert sweep["metric"]["name"] in history(path)[3]
        assert isinstance(last_summary(path)[sweep["metric"]["name"]], float)
