"""launch/evaluate.py: the numbers of the run itself, as a table and as JSON."""

from __future__ import annotations

import json
import math

import pytest

from moe.train.metrics import read_metrics


def test_the_numbers_are_those_that_training_measured_on_the_same_documents(
    command, workplace, tmp_path
):
    trained = [
        record
        for record in read_metrics(workplace.folder / "runs" / "a" / "metrics.jsonl")
        if record["kind"] == "validation"
    ][-1]
    output = tmp_path / "numbers (1).json"
    done = command(
        "evaluate", "run=runs/a", "max_tokens=4000", f"output={output}", cwd=workplace.folder
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_bytes())
    keys = [key for key in trained if key.startswith("validation/")]
    assert {"validation/loss", "validation/bits_per_byte/code", "validation/loss/more"} <= set(keys)
    for key in keys:
        # batches of another size sum in another order
        assert measured[key] == pytest.approx(trained[key], rel=1e-5), key
    assert measured["step"] == 4
    assert measured["split"] == "validation"
    assert f"{measured['validation/loss']:.4f}" in done.stdout
    assert "unigram entropy" in done.stdout
    assert math.isclose(
        measured["validation/perplexity"], math.exp(measured["validation/loss"]), rel_tol=1e-9
    )


@pytest.mark.slow
def test_windows_of_another_length_predict_the_same_tokens(command, workplace, tmp_path):
    records = []
    for arguments in ([], ["seq_len=32"]):
        output = tmp_path / f"{len(records)}.json"
        done = command(
            "evaluate", "run=runs/a", f"output={output}", "batch_size=4", *arguments,
            cwd=workplace.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        records.append(json.loads(output.read_bytes()))
    everything, short = records
    assert short["seq_len"] == 32
    # every token is predicted once, whatever the windows
    assert short["validation/tokens"] == everything["validation/tokens"]
    assert short["validation/unigram_entropy"] == pytest.approx(
        everything["validation/unigram_entropy"]
    )


def test_data_given_by_path_are_used_though_those_of_the_run_are_gone(command, workplace, tmp_path):
    place = workplace.copy(tmp_path).folder
    (place / "data" / "tiny").rename(place / "data" / "moved, [1]")
    gone = command("evaluate", "run=runs/a", "max_tokens=1000", cwd=place)
    assert gone.returncode == 2
    assert "data/tiny does not exist" in gone.stderr
    found = command(
        "evaluate", "run=runs/a", "max_tokens=1000", "split=train",
        "paths.data_dir=data/moved, [1]", cwd=place,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "data/moved, [1], train, " in found.stdout
