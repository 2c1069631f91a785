"""A configuration that names code is refused before Hydra runs, imports or writes any of it.

Every case would leave the file `trap` (with the mend taken out each of them does, but where Hydra's
own short list of names steps in).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import typed_line
import yaml

from moe.config import TrainConfig

CALL = {
    "_target_": "pathlib.Path.write_text",
    "_args_": [{"_target_": "pathlib.Path", "_args_": ["trap"]}, "sprung"],
}
FLOW = (
    "{_target_: pathlib.Path.write_text, "
    "_args_: [{_target_: pathlib.Path, _args_: [trap]}, sprung]}"
)
LOGGING = {
    "version": 1,
    "handlers": {"x": {"class": "logging.FileHandler", "filename": "trap"}},
    "root": {"handlers": ["x"]},
}
# what a file says under hydra:, the key that is named
HYDRA = {
    "callbacks": ({"callbacks": {"x": CALL}}, "hydra.callbacks"),
    "launcher": ({"launcher": {"_target_": "hydra_plugins.trap.Trap"}}, "hydra.launcher"),
    "sweeper": ({"sweeper": {"_target_": "hydra_plugins.trap.Trap"}}, "hydra.sweeper._target_"),
    "job_logging": ({"job_logging": LOGGING}, "hydra.job_logging"),
    "hydra_logging": ({"hydra_logging": LOGGING}, "hydra.hydra_logging"),
    "an_interpolation": ({"callbacks": "${oc.create:${trap}}"}, "hydra.callbacks"),
    "variables": ({"job": {"env_set": {"PYTHONSTARTUP": "x"}}}, "hydra.job.env_set"),
    "output_subdir": ({"output_subdir": ".hydra"}, "hydra.output_subdir"),
    "run_dir": ({"run": {"dir": "trap"}}, "hydra.run.dir"),
    "swept": (
        {"sweeper": {"params": {"hydra.callbacks.x": FLOW}}},
        "hydra.sweeper.params.hydra.callbacks.x",
    ),
}
OURS = ["train_defaults", {"model": "nano_moe"}, "_self_"]
QUIET = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, values: object, *, first: str = "# @package _global_") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{first}\n{yaml.safe_dump(values)}")


def expect_refusal(folder: Path, key: str, *arguments: str, name: str = "train") -> str:
    answer = typed_line.ask(name, arguments)
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*trap*"))
    assert left == []
    assert answer.code == 2, answer
    assert answer.message.startswith(f"{key}: "), answer.message
    assert "A configuration holds values and never names code to run" in answer.message
    return answer.message


@pytest.mark.parametrize("case", HYDRA)
def test_an_experiment_file_cannot_name_code(case: str, folder: Path) -> None:
    values, key = HYDRA[case]
    write(folder / "mine/experiment/e.yaml", {"hydra": values})
    line = ["--config-dir", "mine", "experiment=e"]
    message = expect_refusal(folder, key, *line)
    assert case == "swept" or "mine/experiment/e.yaml" in message


@pytest.mark.parametrize("flags", [["-m", "seed=0,1"], ["--cfg", "job"], ["--info", "all"]])
def test_no_flag_opens_a_way_for_code(flags: list[str], folder: Path) -> None:
    write(folder / "mine/experiment/e.yaml", {"hydra": {"callbacks": {"x": CALL}}})
    expect_refusal(folder, "hydra.callbacks", "--config-dir", "mine", "experiment=e", *flags)


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        (f"+hydra.callbacks.x={FLOW}", "hydra.callbacks.x"),
        (f"++hydra.launcher={FLOW}", "hydra.launcher"),
        ("hydra.sweeper._target_=trap.Trap", "hydra.sweeper._target_"),
        ("hydra.searchpath=[pkg://trap]", "hydra.searchpath"),
        ("hydra/launcher=trap", "hydra.launcher"),
        ("+hydra/callbacks=trap", "hydra.callbacks"),
        ("hydra/job_logging=default", "hydra.job_logging"),
        ("+hydra.job.env_set.LD_PRELOAD=trap", "hydra.job.env_set.LD_PRELOAD"),
        ("hydra.run.dir=trap", "hydra.run.dir"),
        ("hydra.output_subdir=trap", "hydra.output_subdir"),
        ("~hydra.launcher", "hydra.launcher"),
        ("+model._target_=trap", "model._target_"),
        (f"+model.x={FLOW}", "model.x._target_"),
        (f"train.sample_prompt={FLOW}", "train.sample_prompt._target_"),
        (f"data.sources=[{FLOW}]", "data.sources[0]._target_"),
        ("+optim={_partial_: true}", "optim._partial_"),
    ],
)
def test_a_typed_value_cannot_name_code(typed: str, key: str, folder: Path) -> None:
    expect_refusal(folder, key, typed)


@pytest.mark.parametrize("name", ["generate", "evaluate", "prepare_data", "convert", "plan"])
def test_no_command_takes_code(name: str, folder: Path) -> None:
    expect_refusal(folder, "hydra.callbacks.x", f"+hydra.callbacks.x={FLOW}", name=name)
    write(folder / "mine/extra/e.yaml", {"hydra": {"callbacks": {"x": CALL}}})
    expect_refusal(folder, "hydra.callbacks", "--config-dir", "mine", "+extra=e", name=name)


def test_a_swept_choice_cannot_name_code(folder: Path) -> None:
    write(folder / "mine/experiment/good.yaml", {"seed": 1})
    write(folder / "mine/experiment/bad.yaml", {"hydra": {"job_logging": LOGGING}})
    line = ["-m", "--config-dir", "mine", "experiment=bad,good"]
    expect_refusal(folder, "hydra.job_logging", *line)


@pytest.mark.parametrize("flag", ["--config-path", "--config-dir"])
def test_a_primary_file_cannot_name_code(flag: str, folder: Path) -> None:
    for name, hydra in {
        "callbacks": {"callbacks": {"x": CALL}},
        "searchpath": {"searchpath": ["pkg://trap"]},
        "logging": {"job_logging": LOGGING},
    }.items():
        write(folder / f"mine/{name}.yaml", {"defaults": OURS + QUIET, "hydra": hydra}, first="")
        key = "hydra.job_logging" if name == "logging" else f"hydra.{name}"
        line = [flag, str(folder / "mine"), "--config-name", name]
        if flag == "--config-dir":
            expect_refusal(folder, key, *line)
        else:
            write(folder / "mine/model/nano_moe.yaml", {}, first="")
            expect_refusal(folder, key, *line)


def test_a_file_of_a_defaults_list_cannot_name_code(folder: Path) -> None:
    write(folder / "mine/deep/inner.yaml", {"hydra": {"callbacks": {"x": CALL}}})
    write(folder / "mine/experiment/e.yaml", {"defaults": ["/deep/inner"], "seed": 1})
    expect_refusal(folder, "hydra.callbacks", "--config-dir", "mine", "experiment=e")
    own = {"_target_": "hydra_plugins.trap.Trap"}
    write(folder / "mine/hydra/launcher/own.yaml", own, first="# @package hydra.launcher")
    write(folder / "mine/experiment/f.yaml", {"defaults": [{"override /hydra/launcher": "own"}]})
    expect_refusal(folder, "hydra.launcher", "--config-dir", "mine", "experiment=f")


def test_a_package_is_no_place_of_a_configuration(folder: Path) -> None:
    answer = typed_line.ask("train", ["--config-path", "pkg://trap"])
    assert answer.code == 2
    assert answer.message.startswith("--config-path: got 'pkg://trap'")


def test_a_plug_in_of_hydra_is_not_imported(command, tmp_path: Path) -> None:
    plug_in = tmp_path / "site" / "hydra_plugins" / "trap"
    plug_in.mkdir(parents=True)
    (plug_in / "__init__.py").write_text("open('sprung', 'w')\n")
    path = f"{typed_line.LAUNCH.parent}:{tmp_path / 'site'}"
    done = command("train", "--cfg", "job", cwd=tmp_path, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "sprung").exists()


def test_what_is_nothing_but_values_stays_open(folder: Path) -> None:
    write(folder / "mine/experiment/e.yaml", {
        "seed": 3, "hydra": {"sweep": {"dir": "runs/s"}, "sweeper": {"params": {"name": "a,b"}}},
    })  # fmt: skip
    taken = typed_line.ask("train", ["--config-dir", "mine", "experiment=e"]).config
    assert isinstance(taken, TrainConfig)
    assert taken.seed == 3
    for typed in (["-m", "hydra.sweep.dir=runs/x"], ["hydra.verbose=false"], ["name=_target_"]):
        assert typed_line.ask("train", typed).config is not None
