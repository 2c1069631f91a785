"""Programs that test_checkpoint_crashes.py runs: savers that are killed or refused by the system.

Each prints one line of JSON with what happened, and stops with an AssertionError where a checkpoint
was lost, torn or wrong. Children are forked, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe.errors import CheckpointError
from moe.train.checkpoint import Checkpoint, find_checkpoint, save_checkpoint


def content(step: int, version: int, num_values: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1000 * step + version)
    weight = torch.randn(num_values, generator=generator)
    return {"model": {"weight": weight, "half": weight[:7].bfloat16()}, "optimizer": {"m": -weight}}


def save(root: Path, step: int, *, version: int = 0, num_values: int = 100, keep: int = 1) -> None:
    save_checkpoint(
        root,
        step,
        tensors=content(step, version, num_values),
        state={"step": step, "version": version, "num_values": num_values},
        extra_files={"tokenizer.model": bytes([step % 256, version])},
        keep_last=keep,
    )


def found(root: Path) -> Checkpoint:
    """The newest checkpoint: nothing skipped, and holding bitwise what was saved for its step."""
    skipped: list[str] = []
    checkpoint = find_checkpoint(root, on_skip=skipped.append)
    assert not skipped, skipped
    assert checkpoint is not None
    state = checkpoint.state
    assert state["step"] == checkpoint.step
    expected = content(checkpoint.step, state["version"], state["num_values"])
    for stem, tensors in expected.items():
        loaded = checkpoint.tensors(stem)
        assert set(loaded) == set(tensors)
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    given = checkpoint.file("tokenizer.model").read_bytes()
    assert given == bytes([checkpoint.step % 256, state["version"]])
    return checkpoint


def in_child(action: Callable[[], None]) -> int:
    """Run action in a forked process; 0 where it came to its end, else the signal's number."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die_at(event_number: int, root: Path) -> None:
    """Make this process kill itself at its n-th dealing with files under root.

    Counted: every open, folder listing, folder made, rename, removal (before it happens), every
    write (before, and after half of it), every fsync (before).
    """
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == event_number:
            os.kill(os.getpid(), signal.SIGKILL)

    names = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in names:
            tick()

    real_write, real_fsync = os.write, os.fsync

    def write(descriptor: int, data: memoryview) -> int:
        tick()
        half = real_write(descriptor, data[: len(data) // 2])
        tick()
        return half + real_write(descriptor, data[half:])

    def fsync(descriptor: int) -> None:
        tick()
        real_fsync(descriptor)

    sys.addaudithook(hook)
    os.write, os.fsync = write, fsync


def kill_at_every_event(root: Path) -> None:
    """Kill a save at each of its events in turn, and the save after it at a random one."""
    generator = random.Random(0)
    report = {}
    for scenario in ("first", "next", "again"):
        event = 1
        while True:
            shutil.rmtree(root, ignore_errors=True)
            if scenario != "first":
                save(root, 1)
            step, version = (1, 1) if scenario == "again" else (2, 0)

            def attempt(at: int, step: int = step, version: int = version) -> None:
                die_at(at, root)
                save(root, step, version=version)

            finished = in_child(lambda at=event: attempt(at)) == 0
            for _ in range(2):
                if finished or scenario != "first":
                    checkpoint = found(root)
                    state = (checkpoint.step, checkpoint.state["version"])
                    assert state in {(1, 0), (step, version)}, state
                    if finished:
                        assert state == (step, version), state
                elif find_checkpoint(root, on_skip=print) is not None:
                    found(root)
                if event % 3:
                    break
                in_child(lambda: attempt(generator.randint(1, 40)))  # killed in the recovery too
            save(root, 3)
            assert found(root).step == 3
            assert sorted(os.listdir(root)) == ["latest", "step_00000003"], os.listdir(root)
            if finished:
                break
            event += 1
        report[scenario] = event - 1
    print(json.dumps(report))


def kill_at_random_moments(root: Path, num_kills: int) -> None:
    """Kill a process that saves without a pause; count the kills that came inside a save."""
    generator = random.Random(time.time_ns())
    num_inside = num_torn_left = 0
    done = 0
    for _ in range(num_kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            step = done
            while True:
                step += 1
                os.write(writer, f"begin {step}\n".encode())
                save(root, step, num_values=500_000, keep=2)
                os.write(writer, f"end {step}\n".encode())
        os.close(writer)
        assert select.select([reader], [], [], 30)[0]
        time.sleep(generator.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        text = b""
        while piece := os.read(reader, 4096):
            text += piece
        os.close(reader)
        events = [line.split() for line in text.decode().splitlines()]
        num_inside += events[-1][0] == "begin"
        left = os.listdir(root) if root.exists() else []  # killed before it made the folder
        num_torn_left += any(name.startswith(".tmp-step") for name in left)
        ended = max([int(step) for kind, step in events if kind == "end"], default=done)
        if ended or find_checkpoint(root, on_skip=print):
            done = found(root).step
            assert done >= ended, f"step {ended} was saved and {done} was found"
    print(json.dumps({"inside": num_inside, "torn": num_torn_left, "steps": done}))


def refused(root: Path, step: int, num_values: int, reason: str) -> str:
    """A save must fail with one message, leave the newest checkpoint good, and nothing behind."""
    before = found(root)
    names = sorted(os.listdir(root))
    try:
        save(root, step, num_values=num_values)
    except CheckpointError as error:
        message = str(error)
    else:
        raise AssertionError("the save was not refused")
    assert reason in message, message
    assert str(root) in message, message
    assert f"{before.folder.name}, is untouched and still good" in message, message
    assert found(root).folder == before.folder
    assert sorted(os.listdir(root)) == names
    return message


def full_disk(root: Path) -> None:
    """On a disk of 3 MiB: a save larger than it, then one at each amount of room left over."""
    save(root, 1)
    message = refused(root, 2, 2_000_000, "No space left on device")
    refused(root, 1, 2_000_000, "No space left on device")
    num_refused = num_saved = 0
    filler = root.parent / "filler"
    step = 1
    for pages in range(0, 24):
        filler.unlink(missing_ok=True)
        free = shutil.disk_usage(root).free
        filler.write_bytes(bytes(free - 4096 * pages))
        step += 1
        try:
            save(root, step, num_values=3_000)
        except CheckpointError:
            num_refused += 1
            step -= 1
        else:
            num_saved += 1
        assert found(root).step == step
        assert len(os.listdir(root)) == 2
    filler.unlink()
    command = ["mount", "-o", "remount,ro", str(root.parent)]
    remounted = subprocess.run(command, check=False).returncode == 0
    if remounted:
        refused(root, 99, 10, "Read-only file system")
        command[2] = "remount,rw"
        subprocess.run(command, check=True)
    save(root, 100)
    assert found(root).step == 100
    report = {"message": message, "refused": num_refused, "saved": num_saved}
    print(json.dumps(report | {"read_only": remounted}))


def file_size_limit(root: Path) -> None:
    """With the kernel's limit on a file's size at 1 MiB."""
    save(root, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    message = refused(root, 2, 1_000_000, "File too large")
    refused(root, 1, 1_000_000, "File too large")
    save(root, 3)
    assert found(root).step == 3
    print(json.dumps({"message": message}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    program, folder = sys.argv[1], Path(sys.argv[2])
    if program == "kill_at_random_moments":
        kill_at_random_moments(folder, int(sys.argv[3]))
    else:
        {
            "kill_at_every_event": kill_at_every_event,
            "full_disk": full_disk,
            "file_size_limit": file_size_limit,
        }[program](folder)
