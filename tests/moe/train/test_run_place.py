"""A run's folder is a new one or a run's; all else is refused with which folder is meant."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.convert.export_model import export_model
from moe.convert.import_model import import_model
from moe.errors import ConfigError
from moe.load_run import open_run
from moe.run_folder import checkpoint_name
from moe.train.metrics import read_metrics
from moe.train.run import run
from moe.train.run_place import require_run_place, taken_place

sys.path.append(str(Path(__file__).parent))
from two_at_once import STEPS, config_of


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def trained(short_documents, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run_place") / "victim"
    run(config_of(short_documents, folder, seed=0), say=quiet)
    return folder


@pytest.fixture(scope="module")
def others(trained, tmp_path_factory) -> Path:
    """Folders that are no run's: hf, ours (converted), notes."""
    folder = tmp_path_factory.mktemp("others")
    export_model(
        open_run(str(trained), on_skip=pytest.fail), folder / "hf", window=None,
        max_shard_bytes=20_000, on_progress=quiet,
    )  # fmt: skip
    import_model(
        folder / "hf", folder / "ours", window="original", tokenizer=None, on_progress=quiet
    )
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.tex").write_text("years of work")
    return folder


def refused(folder: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        require_run_place(str(folder))
    message = str(caught.value)
    assert message.startswith("paths.run_dir: ")
    return message


def test_a_checkpoint_and_the_folder_of_checkpoints_name_the_run_that_is_meant(trained):
    for inside in ("checkpoints", f"checkpoints/{checkpoint_name(STEPS)}"):
        assert f"The run is paths.run_dir={trained.resolve()}" in refused(trained / inside)


def test_a_checkpoint_that_was_moved_away_is_refused_too(trained, tmp_path):
    step = checkpoint_name(STEPS)
    os.symlink(trained / "checkpoints" / step, tmp_path / "best")
    assert "one checkpoint" in refused(tmp_path / "best")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "manifest.json").write_text("{}")
    assert "manifest.json" in refused(tmp_path / "kept")
    (tmp_path / "several" / step).mkdir(parents=True)
    assert "step_*" in refused(tmp_path / "several")


@pytest.mark.parametrize(
    ("name", "word"),
    [("hf", "a published model"), ("ours", "converted model"), ("notes", "thesis.tex")],
)
def test_what_is_no_run_is_refused_and_left_as_it_is(others, short_documents, hashes, name, word):
    before = hashes(others)
    assert word in refused(others / name)
    with pytest.raises(ConfigError, match=word):
        run(config_of(short_documents, others / name, seed=0), say=quiet)
    assert hashes(others) == before


def test_an_empty_text_and_a_file_are_refused(tmp_path):
    assert "empty text" in refused("")
    assert "empty text" in refused(" ")
    (tmp_path / "file").touch()
    assert "is a file" in refused(tmp_path / "file")


def test_a_run_a_new_folder_and_what_launchers_and_shells_put_first_are_taken(trained, tmp_path):
    require_run_place(str(trained))
    require_run_place(str(tmp_path))
    require_run_place(str(tmp_path / "new"))
    (tmp_path / "slurm").mkdir()
    for name in ("comparison.json", "train.log", "job.out", ".nfs0001", "faults.jsonl"):
        (tmp_path / name).touch()
    require_run_place(str(tmp_path))


def test_a_run_without_a_checkpoint_yet_is_a_run(trained, tmp_path):
    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").touch()
    require_run_place(str(tmp_path))


def test_a_refused_start_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), taken_place(str(tmp_path / "a/b/c"), may_rename=False):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_chosen_name_is_kept_and_one_with_a_made_name_gives_way(tmp_path):
    (tmp_path / "run").mkdir()
    with taken_place(str(tmp_path / "run"), may_rename=False) as folder:
        assert folder == tmp_path / "run"
    with taken_place(str(tmp_path / "run"), may_rename=True) as folder:
        assert folder == tmp_path / "run_2"


def test_two_runs_of_one_second_ten_times_are_twenty_whole_runs(
    short_documents, tmp_path, environment
):
    script = Path(__file__).with_name("two_at_once.py")
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(script), str(short_documents), str(tmp_path), seed, "10"],
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )
            )
            for seed in ("0", "1")
        ]  # fmt: skip
        try:
            for process in processes:
                said, _ = process.communicate(timeout=240)
                assert process.returncode == 0, said
        finally:
            for process in processes:
                process.kill()
    for number in range(10):
        folders = [tmp_path / f"run_{number}", tmp_path / f"run_{number}_2"]
        seeds = {json.loads((f / "config.json").read_text())["seed"] for f in folders}
        assert seeds == {0, 1}
        assert len({(f / "run_id").read_text() for f in folders}) == 2
        losses = []
        for folder in folders:
            records = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
            assert [r["step"] for r in records] == list(range(1, STEPS + 1))
            losses.append(records[-1]["loss"])
            opened = open_run(str(folder), on_skip=pytest.fail)
            assert opened.checkpoint.step == STEPS
            assert opened.config.paths.run_dir == str(folder)
            assert [p for p in folder.iterdir() if p.name.startswith("running")] == []
        assert losses[0] != losses[1]


def test_a_home_full_of_hidden_files_is_nobodys_run(tmp_path):
    for name in (".bashrc", ".ssh"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"holds no run of ours \(it has \.bashrc, \.ssh\)"):
        require_run_place(str(tmp_path))


def test_a_folder_inside_a_run_a_checkpoint_or_prepared_data_is_no_place_for_another_run(
    trained, short_documents, tmp_path
):
    step = trained / "checkpoints" / checkpoint_name(STEPS)
    for inside, what in (
        (trained / "again", "another run"), (trained / "checkpoints" / "b", "another run"),
        (step / "new" / "deep", "a checkpoint"), (short_documents / "run", "prepared data"),
    ):  # fmt: skip
        assert f"lies inside {what}" in refused(inside)
    (tmp_path / "manifest.json").write_text('{"name": "of a web page"}')
    require_run_place(str(tmp_path / "runs" / "new"))
    empty = tmp_path / "linked"
    os.symlink(short_documents, empty)
    assert "prepared data" in refused(empty / "run")
