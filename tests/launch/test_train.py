"""How a run ends: by signals, with closed streams, and when nobody reads what it says."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe.train.interrupted import RunInterrupted, telling_what_is_saved

ROOT = Path(__file__).parents[2]
SHORT = ["train.evaluate_every=0", "train.evaluate_tokens=500", "train.sample_tokens=0"]


@pytest.fixture
def train(environment, workplace, place) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start train(*overrides, redirections=""): launch/train.py as a shell starts it."""
    started = []

    def start(*overrides: str, redirections: str = "") -> subprocess.Popen[str]:
        keys = {a.partition("=")[0] for a in overrides}
        usual = [a for a in [*workplace.train, *SHORT] if a.partition("=")[0] not in keys]
        program = [sys.executable, str(ROOT / "launch" / "train.py"), *usual, *overrides]
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" {redirections}', "bash", *program],
            cwd=place, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            restore_signals=True, preexec_fn=_terminal_signals,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _terminal_signals() -> None:
    # the tests may themselves have been started as a job that ignores them
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _wait_for_steps(run: Path) -> None:
    """Wait until the run's log has three steps."""
    log, until = run / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b'"kind": "train"') >= 3):
        assert time.monotonic() < until
        time.sleep(0.05)


def _checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_run_trains_with_closed_streams_and_a_reader_that_is_gone(train, place):
    closed = train("paths.run_dir=runs/c", redirections="<&- >&- 2>&-")
    read = train("paths.run_dir=runs/p")
    assert read.stdout.readline()
    read.stdout.close()  # as `| head -1` does
    said = read.stderr.read()
    assert read.wait(120) == 0, said
    assert "cannot be written any more (Broken pipe)" in said
    assert "Traceback" not in said
    assert closed.wait(120) == 0
    for name in ("c", "p"):
        assert _checkpoints(place / "runs" / name)[-1] == "step_00000004"
        assert not (place / "runs" / name / "faults.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGHUP", 75)])
def test_a_signal_to_all_of_a_terminal_saves_after_the_step(name, code, train, place):
    run = place / "runs" / "s"
    process = train(
        "train.steps=5000", "train.save_every=0", "data.num_workers=1", "paths.run_dir=runs/s"
    )
    _wait_for_steps(run)
    os.killpg(process.pid, signal.Signals[name])  # readers of data get it as well
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert f"stopped by {name} after step" in said
    assert "Traceback" not in said
    assert len(_checkpoints(run)) == 1


def test_ctrl_c_says_whether_there_is_a_save_to_go_on_from(tmp_path):
    nothing = pytest.raises(RunInterrupted, match="Nothing is saved yet")
    with nothing as caught, telling_what_is_saved(tmp_path / "run"):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    (tmp_path / "run/checkpoints/step_00000004").mkdir(parents=True)
    save = pytest.raises(RunInterrupted, match=f"={tmp_path}/run goes on from the last save")
    with save, telling_what_is_saved(tmp_path / "run"):
        raise KeyboardInterrupt


def test_a_run_interrupted_before_its_first_step_says_that_nothing_is_saved(
    environment, workplace, place
):
    """Where the model would be built, which may take minutes, Ctrl-C is pressed."""
    stand_in = place / "stand_in"
    stand_in.mkdir()
    (stand_in / "sitecustomize.py").write_text(
        "import sys\n\n\ndef press(event, details):\n"
        "    if event == 'open' and str(details[0]).endswith('tokenizer.model'):\n"
        "        raise KeyboardInterrupt\n\n\nsys.addaudithook(press)\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), *workplace.train, "paths.run_dir=runs/i"],
        cwd=place, env=environment | {"PYTHONPATH": f"{stand_in}:{environment['PYTHONPATH']}"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: interrupted. Nothing is saved yet: the same command begins anew."
    )
    assert "Traceback" not in done.stderr


def test_a_mistyped_run_without_data_is_told_of_the_run_not_of_data(command, workplace, tmp_path):
    run = tmp_path / "outputs" / "first" / "checkpoints" / "step_00000004"
    run.mkdir(parents=True)
    done = command("train", "paths.run_dir=outputs/frist", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: paths.run_dir: no run is in 'outputs/frist'")
    assert "Did you mean 'outputs/first'?" in done.stderr
    done = command("train", "paths.run_dir=outputs/frist", "seed=3", cwd=tmp_path)
    assert done.stderr.startswith("error: paths.data_dir")


def test_a_run_begun_in_another_directory_names_where_its_data_are(command, workplace, place):
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(workplace.folder / "runs/a", place / "runs/a")
    done = command("train", f"paths.run_dir={place / 'runs/a'}", cwd=elsewhere)
    assert done.returncode == 2
    assert "reads 'data/tiny', which was typed in the directory where it began" in done.stderr
    data = place.resolve() / "data/tiny"
    assert f"Start there, or give paths.data_dir={data}." in done.stderr
    again = command(
        "train", f"paths.run_dir={place / 'runs/a'}", f"paths.data_dir={data}", cwd=elsewhere
    )
    assert again.returncode == 0, again.stderr
    assert "resume: " in again.stdout
