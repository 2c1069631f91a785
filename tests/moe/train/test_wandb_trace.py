"""A routing trace as a W&B artifact: whole, described, once, and without places of this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_trace import write_routing
from wandb_file import artifacts, leave_the_user_out, of_kind, only_wandb_file

from moe.config import LoggingConfig
from moe.errors import ConfigError, DataError
from moe.train.wandb_trace import ARTIFACT_TYPE, log_trace

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    leave_the_user_out(tmp_path / "home", monkeypatch)
    yield tmp_path / "home"
    wandb.teardown()


def test_the_artifact_is_every_file_of_the_trace_with_its_hash(tmp_path: Path) -> None:
    folder = write_routing(tmp_path / "routing")
    (folder / "note.txt").write_text("not of the trace")
    log_trace(LoggingConfig(job_type="trace"), folder)
    (sent,) = artifacts(only_wandb_file(folder))
    assert sent["type"] == ARTIFACT_TYPE == "routing-trace"
    assert sorted(sent["files"]) == [
        "step_00000001.rank_00000.parquet", "step_00000002.rank_00000.parquet",
        "trace.rank_00000.json", "vocabulary.json",
    ]  # fmt: skip
    for name, (digest, size, place) in sent["files"].items():
        content = (folder / name).read_bytes()
        assert place == folder / name, "`wandb sync` finds it"
        assert size == len(content)
        assert base64.b64decode(digest) == hashlib.md5(content).digest()


def test_its_metadata_say_what_it_is_of_and_name_no_place(tmp_path: Path) -> None:
    folder = write_routing(tmp_path / "routing")
    log_trace(LoggingConfig(), folder)
    (sent,) = artifacts(only_wandb_file(folder))
    metadata = sent["metadata"]
    parquet = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    assert metadata == {
        "kind": "training", "layers": 2, "experts": 4, "top_k": 2, "logits": False, "tokens": 100,
        "documents": 4, "tokens_of_domain": {"code": 50, "prose": 50}, "bytes": parquet,
        "model_sha256": "a" * 64, "data_fingerprint": "b" * 64, "steps": 2, "first_step": 1,
        "last_step": 2, "settings": {"model": "tiny", "router": "topk", "seq_len": 25},
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(metadata)


def test_the_run_of_a_trace_has_its_job_type_and_group(tmp_path: Path) -> None:
    folder = write_routing(tmp_path / "routing")
    log_trace(LoggingConfig(job_type="trace", group="nano"), folder)
    run, *_ = of_kind(only_wandb_file(folder), "run")
    assert (run.job_type, run.run_group) == ("trace", "nano")
    assert run.display_name == "trace of tiny"


def test_logging_a_trace_again_replaces_its_run_and_another_trace_is_another_run(
    tmp_path: Path,
) -> None:
    folder = write_routing(tmp_path / "routing")
    first = log_trace(LoggingConfig(), folder)
    time.sleep(1.1)  # wandb names its folders by the second
    second = log_trace(LoggingConfig(), folder)
    assert first is not None
    assert second is not None
    assert first.name[-8:] == second.name[-8:]
    assert only_wandb_file(folder).parent.name == second.name
    assert (folder / "wandb" / "replaced" / first.name).is_dir()
    other = write_routing(tmp_path / "other", num_steps=3)
    third = log_trace(LoggingConfig(), other)
    assert third is not None
    assert third.name[-8:] != first.name[-8:]


def test_a_trace_above_the_limit_is_refused_before_a_run_is_begun(tmp_path: Path) -> None:
    folder = write_routing(tmp_path / "routing")
    with pytest.raises(ConfigError, match=r"upload_trace_mib: got 0; .*Set .*mib=1 or more"):
        log_trace(LoggingConfig(upload_trace_mib=0), folder)
    assert not (folder / "wandb").exists()


def test_a_trace_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    folder = write_routing(tmp_path / "routing")
    (folder / "step_00000002.rank_00000.parquet").unlink()
    with pytest.raises(DataError, match=r"step_00000002"):
        log_trace(LoggingConfig(), folder)
    assert not (folder / "wandb").exists()


def test_a_trace_whose_settings_hold_a_secret_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "canary7f3a9d")
    folder = write_routing(tmp_path / "canary7f3a9d" / "routing")
    with pytest.raises(ConfigError, match=r"holds a secret \(checkpoint\)"):
        log_trace(LoggingConfig(), folder)
    assert not (folder / "wandb").exists()
