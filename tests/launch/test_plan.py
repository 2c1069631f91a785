"""launch/plan.py: the worked example, other clusters, and one message for a mistake."""

from __future__ import annotations

import re

import pytest


def test_without_arguments_it_is_the_model_cards_run(command, tmp_path):
    done = command("plan", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "plan: phi35_moe, 41,873,153,344 parameters, 6,640,999,744 active" in done.stdout
    assert "0 to 511 on 64 nodes" in done.stdout
    assert re.search(r"as it is said to have been +23\.0 +4,816 +20\.6%", done.stdout)
    assert "does not fit: Adam's moments 311.98 GiB" in done.stdout
    assert "rates assumed" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_slow_network_makes_the_same_plan_slower(command, tmp_path):
    def seconds(cluster: str) -> float:
        done = command("plan", f"cluster={cluster}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return float(re.search(r"^all +([\d,.]+) +100.0%", done.stdout, re.M)[1].replace(",", ""))

    assert seconds("h100x8_ethernet") > 3 * seconds("h100x8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_gpus=100"], "batch_size: got 1024; it must be a multiple"),
        (["parallel.expert_parallel_size=3"], "expert_parallel_size: got 3 with 512 processes"),
        (["cluster=h100x9"], "cluster: got 'h100x9'.*h100x8, h100x8_ethernet"),
        (["cluster.dense_fraction=2"], "cluster.dense_fraction: got 2.0"),
        (["num_gpu=8"], "num_gpu: unknown key.*num_gpus"),
        (["seq_len=8192"], "seq_len: got 8192"),
    ],
)
def test_a_mistake_gets_one_message(command, tmp_path, arguments, message):
    done = command("plan", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.match(f"error: .*{message}", done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
