"""python launch/train.py -m seed=0,1: a folder of its own for each run, and no secret anywhere."""

from __future__ import annotations

import json

import pytest

from moe.train.checkpoint import find_checkpoint
from moe.train.metrics import read_metrics

KEY, PASSWORD = "0123456789abcdef-canary-key", "canary-of-a-password"


@pytest.mark.slow
def test_each_job_has_its_own_folder_configuration_metrics_and_checkpoint_without_secrets(
    command, workplace, tmp_path
):
    place = workplace.copy(tmp_path).folder
    arguments = [a for a in workplace.train if a != "parallel=plain"]  # the default: deepspeed
    done = command(
        "train", "-m", *arguments, "logging=offline", "seed=0,1", "train.sample_tokens=5",
        f"logging.project=x{PASSWORD}", f"train.sample_prompt=a{KEY}", "model.head_bias=true,false",
        cwd=place, env={"WANDB_API_KEY": KEY, "MY_DATABASE_SECRET": PASSWORD},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [sweep] = (place / "runs" / "nano").iterdir()
    folders = sorted(sweep.iterdir())
    assert [folder.name[:2] for folder in folders] == ["0_", "1_", "2_", "3_"]
    wanted = [(0, True), (0, False), (1, True), (1, False)]
    losses = set()
    for folder, (seed, head_bias) in zip(folders, wanted, strict=True):
        assert f"seed-{seed}" in folder.name
        config = json.loads((folder / "config.json").read_bytes())
        assert config["seed"] == seed
        assert config["model"]["head_bias"] is head_bias
        assert (place / config["paths"]["run_dir"]) == folder
        records = read_metrics(folder / "metrics.jsonl")
        assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]
        losses.add([r for r in records if r["kind"] == "validation"][-1]["validation/loss"])
        checkpoint = find_checkpoint(folder / "checkpoints", on_skip=lambda why: None)
        assert checkpoint is not None
        assert checkpoint.step == 4
        assert (folder / "run.png").is_file()
        assert list(folder.glob("wandb/offline-run-*"))
    assert len(losses) == 4
    for path in (place / "runs" / "nano").rglob("*"):
        for secret in (KEY, PASSWORD):
            assert secret not in path.name
            if path.is_file():
                assert secret.encode() not in path.read_bytes(), path


def test_a_wrong_value_in_a_sweep_leaves_no_folder_and_one_message(command, workplace, hashes):
    before = hashes(workplace.folder)
    done = command(
        "train", "-m", *workplace.train, "optim.lr=-1,0.1", f"logging.project={KEY}",
        cwd=workplace.folder, env={"WANDB_API_KEY": KEY},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "optim.lr: got -1" in done.stderr
    assert "Traceback" not in done.stderr
    left = {name: kind for name, kind in hashes(workplace.folder).items() if name not in before}
    assert set(left.values()) <= {"folder"}
    assert KEY not in str(left)
