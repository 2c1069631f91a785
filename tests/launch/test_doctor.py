"""launch/doctor.py: run for real, and in environments that are broken on purpose."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moe.doctor import (
    FAIL,
    OK,
    PACKAGES,
    WARN,
    Package,
    check_all_reduce,
    check_folder,
    check_neighbours,
    check_package,
)

ROOT = Path(__file__).resolve().parent.parent.parent
CANARY = "canary-0123456789abcdef"


def by_name(text: str) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(text)["checks"]}


@pytest.mark.slow
def test_a_good_machine_is_ready_and_every_check_is_listed(command, tmp_path):
    done = command("doctor", "--json", cwd=tmp_path, env={"WANDB_API_KEY": CANARY})
    checks = by_name(done.stdout)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["ok"] is True
    assert all(check["status"] != FAIL for check in checks.values())
    assert checks["gloo"]["found"] == "all_reduce of 2 process(es) on this machine"
    assert re.search(
        r"float32 [\d,]+ GFLOP/s, bfloat16 [\d,]+ GFLOP/s", checks["CPU products"]["found"]
    )
    assert "in WANDB_API_KEY" in checks["W&B"]["found"]
    assert CANARY not in done.stdout + done.stderr
    assert {p.name for p in PACKAGES} <= checks.keys()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_broken_environment_fails_with_the_fixes_in_a_table(command, tmp_path, environment):
    """An old sentencepiece, no network interface, a folder that cannot be written."""
    fake = tmp_path / "fake" / "sentencepiece-0.1.99.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: sentencepiece\nVersion: 0.1.99\n")
    path = os.pathsep.join((str(fake.parent), environment["PYTHONPATH"]))
    cwd = Path("/sys") if sys.platform.startswith("linux") else tmp_path
    done = command("doctor", cwd=cwd, env={"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "nosuch0"})
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    failed = [number for number, line in enumerate(lines) if line.startswith(FAIL)]
    names = [lines[number].split()[1] for number in failed]
    assert names[:2] == ["sentencepiece", "gloo"]
    assert "0.1.99, older than 0.2.1" in lines[failed[0]]
    assert "nosuch0" in lines[failed[1]]
    if cwd != tmp_path:
        assert names[2] == "working"
    assert all("fix: " in lines[number + 1] for number in failed)
    assert lines[-1] == f"{len(failed)} check(s) failed"


def test_it_answers_where_not_one_package_is_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "launch" / "doctor.py")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for name in ("torch", "hydra-core", "deepspeed"):
        assert re.search(rf"^FAIL  {name} +not installed", done.stdout, re.M), done.stdout
    assert "fix: pip install 'torch>=" in done.stdout


def test_a_package_that_is_installed_and_cannot_be_imported_fails(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise ImportError('libnumbers.so.3 is missing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = check_package(PACKAGES[0])
    assert check.status == FAIL
    assert "libnumbers.so.3 is missing" in check.found
    assert "--force-reinstall" in check.fix


@pytest.mark.parametrize(
    ("package", "status", "word"),
    [
        (Package("numpy", "numpy", "1.0", True, ""), OK, ""),
        (Package("numpy", "numpy", "999", True, "why"), FAIL, "older than 999"),
        (Package("numpy", "numpy", "999", False, "why"), WARN, "older than 999"),
        (Package("numpy", "numpy", "1.0", True, "", below="1.1"), WARN, "newer than any"),
        (Package("no-such-package-here", "x", "1", True, "why"), FAIL, "not installed (why)"),
    ],
)
def test_floors_and_ceilings_of_versions(package, status, word):
    check = check_package(package)
    assert check.status == status
    assert word in check.found
    assert bool(check.fix) == (status != OK)


def test_the_floors_are_those_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {}
    for requirement in project["dependencies"] + project["optional-dependencies"]["train"]:
        name, floor = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        ceiling = re.search(r"<([\d.]+)", requirement)
        wanted[name] = (floor, ceiling[1] if ceiling else "")
    assert {p.name: (p.floor, p.below) for p in PACKAGES} == wanted


def test_a_process_that_never_answers_is_given_up_on():
    check = check_all_reduce("gloo", world_size=2, seconds=0.05)
    assert check.status == FAIL
    assert "no answer" in check.found


def test_a_folder_is_tried_by_writing_to_it(tmp_path):
    assert check_folder(tmp_path).status in (OK, WARN)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    check = check_folder(tmp_path / "file")
    assert check.status == FAIL
    assert check.fix


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/stat is Linux's")
def test_a_busy_neighbour_is_found_and_named():
    core = str(min(os.sched_getaffinity(0)))
    code = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", code, core])
    try:
        check = check_neighbours()
    finally:
        neighbour.kill()
        neighbour.wait(timeout=30)
    assert check.status == WARN
    assert check.found.startswith("cores are shared: other programs keep ")
    assert check.fix
