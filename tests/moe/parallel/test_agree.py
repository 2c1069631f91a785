"""Ranks of two kinds never wait for each other: the one that differs is named, within seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moe.errors import ConfigError
from moe.parallel.agree import Place, fault_of, own_place, require_device
from moe.parallel.launcher import Launch

ROOT = Path(__file__).parents[3]
CPU = Place("a", "cpu", "", "2.0")
GPUS = [Place("a", f"cuda:{index}", f"uuid {index}", "2.0") for index in range(4)]
PROGRAM = """
import sys
import moe.parallel.processes as p
from moe.errors import UserError
from moe.parallel.agree import Place
if p.read_launch().rank == 1:
    p.own_place = lambda launch, name: Place("other", "cuda:0", "x", str(p.torch.__version__))
try:
    p.join_processes()
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_ranks_that_are_alike_may_start() -> None:
    assert fault_of([CPU, CPU], asked="auto") == ""
    assert fault_of(GPUS, asked="cuda") == ""


def test_a_rank_without_a_gpu_among_ranks_that_have_one_is_named_with_its_host() -> None:
    fault = fault_of([*GPUS, replace(CPU, host="b")], asked="auto")
    assert fault.startswith(
        "parallel.device: got 'auto', and torch finds no GPU on rank 4 (host b)"
    )
    assert "the 4 other ranks have one" in fault


def test_a_broken_driver_is_named_with_what_it_says() -> None:
    broken = Place("b", "", "", "2.0", "CUDA error: unknown error")
    fault = fault_of([GPUS[0], broken], asked="cuda")
    assert "rank 1 (host b) cannot use a GPU (CUDA error: unknown error)" in fault


def test_another_version_of_torch_is_named() -> None:
    fault = fault_of([CPU, CPU, replace(CPU, host="b", torch="1.9")], asked="cpu")
    assert fault.startswith("torch: rank 2 (host b) has version 1.9, the others 2.0")


def test_two_ranks_on_one_gpu_are_named() -> None:
    fault = fault_of([GPUS[0], GPUS[1], GPUS[0]], asked="cuda")
    assert "rank 0 (host a) and rank 2 (host a) have one GPU between them" in fault
    assert fault_of([GPUS[0], replace(GPUS[0], host="b")], asked="cuda") == ""


def test_a_large_job_is_told_in_one_short_line() -> None:
    fault = fault_of([*[CPU] * 500, *GPUS], asked="auto")
    assert "and 492 more" in fault
    assert len(fault) < 800


def test_a_gpu_that_is_demanded_and_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    place = own_place(Launch(0, 1, 0), "cuda")
    with pytest.raises(ConfigError, match=r"parallel\.device: got 'cuda', and this machine"):
        require_device(place, asked="cuda")


@pytest.mark.parametrize(("count", "index"), [(8, 3), (1, 0)])
def test_a_task_that_sees_one_gpu_alone_takes_it(
    count: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("torch.zeros", lambda *_, **__: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: None)
    assert own_place(Launch(3, 8, 3), "auto").device == f"cuda:{index}"
    assert chosen == [index]


def test_a_place_beyond_the_gpus_of_its_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "number 3 on its host, and torch finds 2" in own_place(Launch(3, 8, 3), "cuda").error


def test_real_ranks_of_two_kinds_end_at_once_with_the_same_message() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert said[0] == said[1]
    assert said[0].startswith("parallel.device: got 'auto', and torch finds no GPU on rank 0 (host")
    assert time.monotonic() - began < 100  # torch is imported first, on a busy machine
