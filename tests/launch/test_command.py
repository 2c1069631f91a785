"""What every command does at its start, before a configuration is composed."""

from __future__ import annotations

import os
import stat
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
