"""What every command does at its start, before a configuration is composed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from command import _give_a_home


def test_a_user_without_a_home_and_a_name_gets_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _give_a_home()
    home = Path(os.environ["HOME"])
    assert home.parent == tmp_path
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    _give_a_home()
    assert os.environ["HOME"] == str(home)
    home.chmod(0o777)  # somebody else's, perhaps
    _give_a_home()
    assert os.environ["HOME"] != str(home)


def test_a_home_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/somewhere"})
    _give_a_home()
    assert os.environ == {"HOME": "/somewhere"}


def test_a_text_that_the_terminal_cannot_show_ends_no_command(command, tmp_path: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = command("train", "name='größe'", "--cfg", "job", cwd=tmp_path, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "gr\\xf6\\xdfe" in done.stdout


@pytest.mark.parametrize(("asked", "code"), [("prompt=-", 0), ("chat=true", 2)])
def test_a_closed_standard_input_is_an_empty_one(
    asked: str, code: int, environment, workplace
) -> None:
    script = str(Path(__file__).parents[2] / "launch" / "generate.py")
    line = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, script, "run=runs/a", asked]
    done = subprocess.run(
        line, cwd=workplace.folder, env=environment, capture_output=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
