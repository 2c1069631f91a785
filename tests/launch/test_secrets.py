"""Secrets that were typed reach no file: of a run, and of a batch script."""

from __future__ import annotations

import stat

from test_mistakes import expect_refusal

PLANTED = {"GITHUB_PAT": "planted-secret-of-a-user", "DB_PASS": "planted-secret-of-a-host"}
TYPED = [f"name={PLANTED['GITHUB_PAT']}", f"logging.tags=[{PLANTED['DB_PASS']}]"]


def holders(folder) -> list[str]:
    """Files below folder that hold a planted secret, in their content or their name."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert paths
    return [p.name for p in paths if "planted-" in p.name or b"planted-" in p.read_bytes()]


def test_no_file_of_a_run_holds_a_secret(command, workplace, place):
    line = [*workplace.train, *TYPED, "paths.run_dir=runs/s", "train.sample_tokens=0"]
    done = command("train", *line, cwd=place, env=PLANTED)
    assert done.returncode == 0, done.stderr
    assert holders(place / "runs" / "s") == []
    # and where it fails
    (place / "runs/s/checkpoints/step_00000004/model.safetensors").write_bytes(b"")
    (place / "runs/s/checkpoints/step_00000002/model.safetensors").write_bytes(b"")
    assert command("train", *line, cwd=place, env=PLANTED).returncode == 2
    assert holders(place / "runs" / "s") == []


def test_a_batch_script_is_private_and_holds_no_secret(command, workplace, place):
    line = [*workplace.train, "launcher=slurm", "launcher.submit=false", "paths.run_dir=runs/s"]
    for typed in TYPED:
        done = command("train", *line, typed, cwd=place, env=PLANTED)
        expect_refusal(done, [f"{typed.partition('=')[0]}: it holds a secret", "${oc.env:NAME}"])
        assert not (place / "runs").exists()
    # SLURM's own options are written as they are, so none may name a secret
    account = "launcher.account='${oc.env:DB_PASS}'"
    done = command("train", *line, account, cwd=place, env=PLANTED)
    expect_refusal(done, ["launcher.account: it holds a secret"])
    # what the message says: a variable's name in the place of its value
    advised = ["name=${oc.env:GITHUB_PAT}", "logging.tags=['${oc.env:DB_PASS}']"]
    done = command("train", *line, *advised, cwd=place, env=PLANTED)
    assert done.returncode == 0, done.stderr
    assert holders(place / "runs" / "s" / "slurm") == []
    script = place / "runs" / "s" / "slurm" / "job.sbatch"
    assert "${oc.env:GITHUB_PAT}" in script.read_text()
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
