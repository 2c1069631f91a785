"""What is given as a run and is none: each is told what it is and what to do."""

from __future__ import annotations

import pytest

from moe.errors import CheckpointError
from moe.run_folder import find_run


@pytest.mark.parametrize("key", ["run", "train.init_from"])
def test_a_hugging_face_folder_is_told_to_be_converted_first(key, tmp_path):
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        find_run(str(tmp_path), key=key)
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert f"python launch/convert.py source={tmp_path} target=NEW" in message


def test_a_name_on_a_hub_is_told_that_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"nothing is downloaded here.*launch/convert\.py"):
        find_run("microsoft/Phi-3.5-MoE-instruct")
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match=r"does not exist \(working directory"):
        find_run("runs/none")


def test_prepared_data_are_no_checkpoint_to_be_deleted(tmp_path):
    for name in ("manifest.json", "train.documents.npy", "train-00000.tokens"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="is prepared data, which holds text and no model"):
        find_run(str(tmp_path))
