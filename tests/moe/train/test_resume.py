"""A run goes on as itself: its own settings and what is typed; every difference is said."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe.config import TrainConfig
from moe.config_from_dict import from_dict
from moe.errors import CheckpointError, ConfigError
from moe.run_folder import checkpoint_name
from moe.train.metrics import read_metrics
from moe.train.redact import REDACTED
from moe.train.resume import TYPED, configuration_of, flat, go_on, nested
from moe.train.run import run

sys.path.append(str(Path(__file__).parent))
from two_at_once import STEPS, config_of


def quiet(*_: object) -> None:
    pass


def changed(config: TrainConfig, group: str, **values: Any) -> TrainConfig:
    part = dataclasses.replace(getattr(config, group), **values)
    return dataclasses.replace(config, **{group: part})


@pytest.fixture(scope="module")
def trained(short_documents, tmp_path_factory) -> Path:
    """A run of optim.lr=1e-4, its last rate with it."""
    folder = tmp_path_factory.mktemp("resume") / "a"
    config = changed(config_of(short_documents, folder, seed=0), "optim", lr=1e-4)
    run(config, say=quiet)
    return folder


@pytest.fixture
def mine(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def its_config(folder: Path) -> TrainConfig:
    values = configuration_of(folder)
    assert values is not None
    values["paths"]["run_dir"] = str(folder)
    return from_dict(TrainConfig, values)


def test_without_a_word_of_the_command_everything_is_the_run_s_own(mine):
    composed = asdict(TrainConfig())
    composed["paths"]["run_dir"] = str(mine)
    values = go_on(mine, composed, asked={"paths.run_dir": TYPED})
    assert from_dict(TrainConfig, values) == its_config(mine)
    assert values["optim"]["lr"] == 1e-4


def test_a_typed_key_is_taken_and_the_launcher_is_the_command_s(mine):
    composed = asdict(TrainConfig())
    composed["optim"]["lr"], composed["launcher"]["num_nodes"] = 5e-3, 4
    values = go_on(mine, composed, asked={"optim.lr": TYPED})
    assert values["optim"]["lr"] == 5e-3
    assert values["launcher"]["num_nodes"] == 4
    assert values["train"]["steps"] == STEPS


def test_another_name_of_data_brings_its_folder(mine):
    composed = asdict(TrainConfig())
    composed["data"]["name"], composed["paths"]["data_dir"] = "other", "data/other"
    own = its_config(mine).paths.data_dir
    assert go_on(mine, composed, asked={})["paths"]["data_dir"] == own
    values = go_on(mine, composed, asked={"data.name": TYPED})
    assert values["paths"]["data_dir"] == "data/other"


def test_a_preset_changes_no_mathematics_of_a_run_under_way_in_silence(mine):
    composed = asdict(TrainConfig())
    with pytest.raises(ConfigError) as caught:
        go_on(mine, composed, asked={"optim.lr": "experiment=nano"})
    message = str(caught.value)
    assert message.startswith("optim.lr: experiment=nano says 0.002, and the run in ")
    assert "has 0.0001. Leave experiment=nano out" in message
    assert message.endswith("optim.lr=0.0001 is the run's own.")
    own = go_on(mine, composed, asked={"train.evaluate_every": "experiment=nano"})
    assert own["train"]["evaluate_every"] == 0
    shutil.rmtree(mine / "checkpoints")  # nothing is trained yet
    assert go_on(mine, composed, asked={"optim.lr": "experiment=nano"})["optim"]["lr"] == 1e-4


def test_a_hidden_secret_is_asked_of_the_command_again(mine):
    values = json.loads((mine / "config.json").read_text())
    values["logging"]["project"] = f"x{REDACTED}"
    (mine / "config.json").write_text(json.dumps(values))
    composed = asdict(TrainConfig())
    assert go_on(mine, composed, asked={})["logging"]["project"] == "phimoe"


def test_a_folder_without_its_config_has_that_of_its_newest_checkpoint(mine):
    (mine / "config.json").unlink()
    assert its_config(mine).optim.lr == 1e-4
    (mine / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        configuration_of(mine)


def test_what_changes_is_said_and_kept_and_the_first_configuration_stays(mine):
    before = (mine / "config.json").read_bytes()
    said: list[str] = []
    config = changed(changed(its_config(mine), "train", steps=STEPS + 2), "optim", lr=1e-3)
    run(config, say=said.append)
    assert "note: optim.lr: was 0.0001, is 0.001 from here on" in said
    assert f"note: train.steps: was {STEPS}, is {STEPS + 2} from here on" in said
    assert (mine / "config.json").read_bytes() == before
    kept = json.loads((mine / "resumes" / f"0001_step_{STEPS:08d}.json").read_text())
    assert kept["step"] == STEPS
    assert kept["changed"]["optim.lr"] == {"before": 1e-4, "now": 1e-3}
    assert its_config(mine) == config  # what the next resume goes on with
    rates = [r["lr"] for r in read_metrics(mine / "metrics.jsonl")
             if r["kind"] == "train"]  # fmt: skip
    assert rates[-1] > max(rates[:STEPS]) * 0.5
    said.clear()
    run(config, say=said.append)
    assert [line for line in said if line.startswith("note: ")] == []
    assert [p.name for p in sorted((mine / "resumes").iterdir())][1:] == [
        f"0002_step_{STEPS + 2:08d}.json"
    ]


def test_a_change_of_a_finished_run_is_said_to_last_for_this_command_alone(mine):
    said: list[str] = []
    run(changed(its_config(mine), "optim", lr=1e-3), say=said.append)
    assert "note: optim.lr: was 0.0001, is 0.001 in this command alone: no step is left" in said
    assert its_config(mine).optim.lr == 1e-4


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.batch_size", 7), ("parallel.bf16_parameters", True), ("seed", 1),
     ("model.num_heads", 3)],
)  # fmt: skip
def test_another_run_is_refused_in_the_key_that_was_typed_before_keys_that_go_with_it(
    mine, key, value
):
    composed = flat(asdict(its_config(mine)))
    was, composed["train.precision"] = composed[key], "auto"
    composed[key] = value
    with pytest.raises(CheckpointError) as caught:
        go_on(mine, nested(composed), asked={key: TYPED})
    assert f"{key}: the run has {was!r}, this command asks for {value!r}" in str(caught.value)
    composed |= {key: was, "router.z_coef": str(composed["router.z_coef"]), "data.seq_len": 1e9}
    go_on(mine, nested(composed), asked={key: TYPED, "router.z_coef": TYPED})
    shutil.rmtree(mine / "checkpoints")  # nothing is trained yet: nothing is another run
    assert flat(go_on(mine, nested(composed | {key: value}), asked={key: TYPED}))[key] == value


def test_fewer_steps_than_are_done_are_refused(mine, hashes):
    before = hashes(mine)
    with pytest.raises(ConfigError, match=rf"train.steps: got 2, .* has done {STEPS} steps"):
        run(changed(its_config(mine), "train", steps=2), say=quiet)
    assert hashes(mine) == before


def test_other_weights_for_a_run_that_has_its_own_are_refused(mine, hashes):
    before = hashes(mine)
    with pytest.raises(ConfigError, match=r"train.init_from: got 'x', .* from random weights"):
        run(changed(its_config(mine), "train", init_from="x"), say=quiet)
    assert hashes(mine) == before


def test_another_precision_through_the_parameters_is_refused(mine):
    config = changed(changed(its_config(mine), "train", precision="auto"), "parallel",
                     engine="deepspeed", zero_stage=1, bf16_parameters=True)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"parallel.bf16_parameters: .*float32"):
        run(config, say=quiet)


def test_that_the_balance_loss_counts_other_tokens_is_said(mine):
    said: list[str] = []
    run(changed(its_config(mine), "train", micro_batch_size=1), say=said.append)
    assert [line for line in said if "balance loss" in line] == [
        "note: the balance loss counts the experts' load over 1 windows of a rank from here on, "
        "2 before (train.micro_batch_size)"
    ]


def test_a_run_that_is_older_than_a_key_goes_on(mine, hashes):
    """As if router.z_coef and model.dropout keys had been added since."""
    from moe.train.checkpoint import find_checkpoint
    from moe.train.state import refuse_other_run

    config = its_config(mine)
    checkpoint = find_checkpoint(mine / "checkpoints", on_skip=pytest.fail)
    assert checkpoint is not None
    path = mine / "checkpoints" / checkpoint_name(STEPS) / "config.json"
    values = json.loads(path.read_text())
    del values["router"]["z_coef"], values["model"]["rope"]
    path.write_text(json.dumps(values))
    object.__setattr__(checkpoint, "verified", {"config.json": _identity(path)})
    fingerprint = checkpoint.state["data_fingerprint"]
    refuse_other_run(checkpoint, config=config, data_fingerprint=fingerprint)
    other = changed(config, "router", z_coef=0.5)
    with pytest.raises(CheckpointError, match=r"router.z_coef: the checkpoint has 0.0"):
        refuse_other_run(checkpoint, config=other, data_fingerprint=fingerprint)


def _identity(path: Path) -> Any:
    from moe.train.atomic_files import file_identity

    return file_identity(path)


def test_a_prompt_that_is_too_long_is_refused_before_a_step(short_documents, tmp_path):
    config = config_of(short_documents, tmp_path / "a", seed=0)
    config = changed(config, "train", sample_prompt="word " * 50, sample_tokens=5)
    with pytest.raises(ConfigError, match=r"train.sample_prompt: got a text of \d+ tokens; .* 32"):
        run(config, say=quiet)
    assert not (tmp_path / "a").exists()
