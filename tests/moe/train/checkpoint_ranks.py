"""The program that test_checkpoint_writer.py and test_sharded_crashes.py run: ranks that save.

Ranks are forked, so that torch is imported once, and meet over gloo as real ones do.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_crashes import die_at

from moe.parallel.pieces import Piece
from moe.parallel.processes import Processes
from moe.train import checkpoint_verify, checkpoint_writer, host_copy
from moe.train.checkpoint import Checkpoint, find_checkpoint
from moe.train.checkpoint_writer import CheckpointWriter, Saved

Action = Callable[[Processes], Any]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def on_ranks(world_size: int, action: Action) -> list[Any]:
    """Run action on forked ranks; what each returned, {"error": ...} or {"signal": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                _be_rank(rank, world_size, Path(folder), action)
            children.append(child)
        results = []
        for rank, child in enumerate(children):
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                results.append({"signal": os.WTERMSIG(status)})
            else:
                results.append(json.loads((Path(folder) / f"result{rank}").read_text()))
        return results


def _be_rank(rank: int, world_size: int, folder: Path, action: Action) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
            timeout=timedelta(seconds=30),
        )  # fmt: skip
        result = action(Processes(rank, world_size, torch.device("cpu")))
    except BaseException as error:
        traceback.print_exc()
        result = {"error": type(error).__name__, "message": str(error)}
    (folder / f"result{rank}").write_text(json.dumps(result))
    os._exit(0)


def whole(step: int, num_values: int = 60) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(4, num_values // 4, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
    }


def pieces_of(step: int, ranks: Processes, num_values: int = 60) -> dict[str, list[Piece]]:
    """Rank r has the r-th part of weight and of its moment; rank 0 the rest, and the schedule."""
    tensors = whole(step, num_values)
    weight = tensors["weight"]
    edges = [num_values * r // ranks.world_size + (r == 1) for r in range(ranks.world_size)]
    start, end = ([*edges, num_values])[ranks.rank : ranks.rank + 2]
    part = weight.reshape(-1)[start:end].clone()
    held = {
        "model": [Piece("weight", tuple(weight.shape), start, part)],
        "optimizer": [Piece("weight.m", tuple(weight.shape), start, -part)],
    }
    if ranks.is_first:
        held["model"] += [
            Piece(n, tuple(tensors[n].shape), 0, tensors[n]) for n in ("half", "empty")
        ]
        held["schedule"] = [Piece("lr", (), 0, torch.tensor(0.5))]
    return held


def save(
    writer: CheckpointWriter, ranks: Processes, step: int, num_values: int = 60
) -> Saved | None:
    return writer.save(
        step,
        pieces=pieces_of(step, ranks, num_values),
        state={"step": step, "num_values": num_values},
        extra_files={"config.json": b"{}"},
    )


def check(root: Path, ranks: Processes | None = None) -> Checkpoint:
    """The newest checkpoint: nothing skipped, and holding bitwise what was saved for its step."""
    skipped: list[str] = []
    found = find_checkpoint(root, on_skip=skipped.append, processes=ranks)
    assert not skipped, skipped
    assert found is not None
    expected = whole(found.step, found.state["num_values"])
    loaded = found.tensors("model")
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert torch.equal(found.tensors("optimizer")["weight.m"], -expected["weight"])
    assert found.tensors("schedule")["lr"].item() == 0.5
    assert found.state["step"] == found.step
    return found


def writer_of(root: Path, ranks: Processes, *, background: bool, keep: int = 3) -> CheckpointWriter:
    return CheckpointWriter(root, processes=ranks, keep_last=keep, in_background=background)


def message_of(action: Callable[[], object]) -> list[str]:
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


@contextlib.contextmanager
def held_back(is_held: bool) -> Iterator[threading.Event]:
    """Within the block, this rank's writer waits for the event before it writes anything."""
    may_write = threading.Event()
    real = checkpoint_writer.write_files

    def write_files(*arguments: Any, **named: Any) -> Any:
        assert may_write.wait(60)
        return real(*arguments, **named)

    if is_held:
        checkpoint_writer.write_files = write_files
    try:
        yield may_write
    finally:
        may_write.set()
        checkpoint_writer.write_files = real


def in_the_foreground(root: Path) -> list[Any]:
    def action(ranks: Processes) -> Any:
        writer = writer_of(root, ranks, background=False, keep=2)
        saved = [save(writer, ranks, step) for step in (1, 2, 3)]
        assert writer.poll() is None
        assert writer.finish() is None
        found = check(root, ranks)
        assert all(one is not None and one.write_seconds <= one.stall_seconds for one in saved)
        last = saved[-1]
        assert last is not None
        return {
            "steps": [one.step for one in saved if one],
            "folder": last.folder.name,
            "num_bytes": last.num_bytes,
            "on_disk": sum(p.stat().st_size for p in last.folder.iterdir()),
            "manifest": (last.folder / "manifest.json").stat().st_size,
            "hashes": found.hashes("model"),
        }

    return on_ranks(3, action)


def in_the_background(root: Path) -> list[Any]:
    """A save goes on while parameters change; nothing is there before all ranks have written."""

    def action(ranks: Processes) -> Any:
        writer = writer_of(root, ranks, background=True)
        held = pieces_of(1, ranks)
        state = {"step": 1, "num_values": 60, "list": [1]}
        with held_back(ranks.rank == 1) as may_write:
            first = writer.save(1, pieces=held, state=state, extra_files={"config.json": b"{}"})
            for table in held.values():
                for piece in table:
                    piece.values.zero_()
            state["step"] = 99
            time.sleep(0.3)  # rank 0's writer is done long since
            polled = [writer.poll() for _ in range(3)]
            names = sorted(p.name.split("-")[0] for p in root.iterdir())
            ranks.barrier()
            may_write.set()
            while (saved := writer.poll()) is None:
                time.sleep(0.005)
            assert saved.stall_seconds < 0.3 <= saved.write_seconds + 0.05
        check(root, ranks)
        with held_back(ranks.rank == 0) as may_write:
            assert save(writer, ranks, 2) is None
            threading.Timer(0.5, may_write.set).start()
            before = save(writer, ranks, 3)  # waits for the save before
        assert before is not None
        last = writer.finish()
        assert last is not None
        assert check(root, ranks).step == 3
        return {
            "first": first is None, "polled": polled, "names": names, "before": before.step,
            "last": last.step, "waited": last.waited_seconds, "stall": last.stall_seconds,
            "write": before.write_seconds,
        }  # fmt: skip

    return on_ranks(2, action)


def a_rank_is_refused(root: Path) -> list[Any]:
    """Rank 1 may write files of at most 64 KiB: every rank is told, and the next save is good."""

    def action(ranks: Processes) -> Any:
        messages = []
        for background in (False, True):
            writer = writer_of(root, ranks, background=background, keep=1)
            save(writer, ranks, 1 + 10 * background)
            writer.finish()
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if ranks.rank == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))

            def too_large(
                writer: CheckpointWriter = writer, step: int = 2 + 10 * background
            ) -> None:
                save(writer, ranks, step, num_values=100_000)
                writer.finish()

            messages.append(message_of(too_large))
            ranks.barrier()
            names = sorted(p.name for p in root.iterdir())
            assert names == ["latest", f"step_{1 + 10 * background:08d}"], names
            check(root, ranks)
            ranks.barrier()
            assert writer.finish() is None
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            save(writer, ranks, 3 + 10 * background)
            writer.finish()
            assert check(root, ranks).step == 3 + 10 * background
        return messages

    return on_ranks(2, action)


def the_folder_is_refused(root: Path) -> list[Any]:
    """The checkpoints' folder is a file; then rank 0 cannot publish."""
    root.parent.mkdir(exist_ok=True)
    root.write_text("a file")

    def action(ranks: Processes) -> Any:
        writer = writer_of(root, ranks, background=False)
        messages = [message_of(lambda: save(writer, ranks, 1))]
        ranks.barrier()
        if ranks.is_first:
            root.unlink()
        ranks.barrier()
        save(writer, ranks, 1)
        real = checkpoint_writer.publish

        def publish(*_: object) -> None:
            raise OSError(5, "Input/output error")

        checkpoint_writer.publish = publish
        messages.append(message_of(lambda: save(writer, ranks, 2)))
        checkpoint_writer.publish = real
        ranks.barrier()
        assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000001"]
        assert check(root, ranks).step == 1
        return messages

    return on_ranks(2, action)


def a_rank_has_a_bug(root: Path) -> list[Any]:
    """No refusal of the disk: that rank raises its own error, the others one that names it."""

    def action(ranks: Processes) -> Any:
        writer = writer_of(root, ranks, background=True)
        real = host_copy.HostCopies.copy
        if ranks.rank == 1:

            def copy(*_: object) -> Any:
                raise MemoryError("no room for copies")

            host_copy.HostCopies.copy = copy  # type: ignore[method-assign]
        save(writer, ranks, 1)
        message = message_of(writer.finish)
        host_copy.HostCopies.copy = real  # type: ignore[method-assign]
        ranks.barrier()
        assert list(root.iterdir()) == []
        save(writer, ranks, 2)
        writer.finish()
        assert check(root, ranks).step == 2
        return message

    return on_ranks(2, action)


def _swapped(held: dict[str, list[Piece]], **changes: Any) -> dict[str, list[Piece]]:
    return held | {"model": [held["model"][0]._replace(**changes), *held["model"][1:]]}


def contents_are_refused(root: Path) -> list[Any]:
    """Pieces that are no whole tensors stop every rank before anything is written."""

    def action(ranks: Processes) -> Any:
        writer = writer_of(root, ranks, background=False)
        last = ranks.rank == 1

        def refused(held: dict[str, list[Piece]], step: int = 5, **more: Any) -> list[str]:
            arguments = {"pieces": held, "state": {}, "extra_files": {}} | more
            return message_of(lambda: writer.save(step, **arguments))

        held = pieces_of(5, ranks)
        start, values = held["model"][0].start, held["model"][0].values
        odd = {
            "gap": _swapped(held, start=start + 1, values=values[1:]) if last else held,
            "overlap": _swapped(held, start=start - 1) if last else held,
            "no end": _swapped(held, values=values[:-1]) if last else held,
            "twice": held | {"model": held["model"] * 2} if last else held,
            "another type": _swapped(held, values=values.double()) if last else held,
            "another shape": _swapped(held, shape=(60,)) if last else held,
            "outside": _swapped(held, start=50) if last else held,
            "negative": _swapped(held, start=-1) if last else held,
            "range name": _swapped(held, name="weight[0:5]") if last else held,
            "complex": _swapped(held, values=values.to(torch.complex128)) if last else held,
            "shard's stem": {"model-00001-of-00002": held["model"]} if last else held,
        }
        messages = {name: refused(pieces) for name, pieces in odd.items()}
        messages["another step"] = refused(held, step=5 + last)
        messages["state"] = refused(held, state={"a": (1,)} if last else {})
        messages["file"] = refused(held, extra_files={"manifest.json": b""} if last else {})
        ranks.barrier()
        assert not root.exists()
        save(writer, ranks, 5)
        assert check(root, ranks).step == 5
        return messages

    return on_ranks(2, action)


def the_layout_changes(root: Path) -> list[Any]:
    """What ranks hold is told once, told again when it changes, and after a refusal."""

    def action(ranks: Processes) -> Any:
        writer = writer_of(root, ranks, background=False, keep=9)
        told: list[bool] = []
        real = writer._exchange

        def exchange(text: Any) -> Any:
            if "pieces" in text:
                told.append(text["pieces"] is not None)
            return real(text)

        writer._exchange = exchange  # type: ignore[method-assign]
        save(writer, ranks, 1)
        save(writer, ranks, 2)
        save(writer, ranks, 3, num_values=80)
        check(root, ranks)
        save(writer, ranks, 4, num_values=80)
        check(root, ranks)
        # rank 0 alone holds all now: plain files
        held = whole(5)
        whole_pieces = {"model": [Piece(n, tuple(t.shape), 0, t) for n, t in held.items()]}
        writer.save(5, pieces=whole_pieces if ranks.is_first else {"model": []}, state={})
        found = find_checkpoint(root, on_skip=print, processes=ranks)
        assert found is not None
        assert all(torch.equal(t, held[n]) for n, t in found.tensors("model").items())
        files = [sorted(p.name for p in (root / f"step_{step:08d}").iterdir()) for step in (4, 5)]
        return {"told": told, "files": files}

    return on_ranks(2, action)


def every_rank_hashes_a_share(root: Path) -> list[Any]:
    """Four ranks open a checkpoint of two; a fault that one of them sees is every rank's."""

    def build(ranks: Processes) -> Any:
        for step in (1, 2):
            save(writer_of(root, ranks, background=False), ranks, step, num_values=20_000)

    on_ranks(2, build)
    path = root / "step_00000002" / "optimizer-00001-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    other = root.parent / "other"
    (other / "step_00000001").mkdir(parents=True)

    def action(ranks: Processes) -> Any:
        hashed: list[str] = []
        real = checkpoint_verify.hash_file

        def hash_file(path: Path, **named: Any) -> Any:
            hashed.append(path.name)
            return real(path, **named)

        checkpoint_verify.hash_file = hash_file
        skipped: list[str] = []
        found = find_checkpoint(root, on_skip=skipped.append, processes=ranks)
        assert found is not None
        into = torch.empty(3)
        found.read_range("model", "weight", 9_999, into)
        expected = whole(1, 20_000)["weight"].reshape(-1)[9_999:10_002]
        assert torch.equal(into, expected)
        # rank 1 has a disk of its own at that path
        apart = message_of(
            lambda: find_checkpoint(
                other if ranks.rank == 1 else root, on_skip=lambda _: None, processes=ranks
            )
        )
        absent = find_checkpoint(root / "absent", on_skip=print, processes=ranks)
        return {
            "hashed": hashed, "skipped": skipped, "step": found.step, "apart": apart,
            "absent": absent is None,
        }  # fmt: skip

    return on_ranks(4, action)


def kill_at_every_event(base: Path, killed: tuple[int, ...], background: bool) -> dict[str, int]:
    """Kill ranks at each of their dealings with files in a save in turn.

    At every one of them a whole checkpoint is found, the rank that lives on ends with an error by
    itself, and the next save is good and leaves nothing of the killed one behind.
    """
    first, root = base / "first", base / "c"

    def start(ranks: Processes) -> None:
        save(writer_of(first, ranks, background=False), ranks, 1)

    on_ranks(2, start)
    event = 1
    found = []
    while True:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(first, root)

        def attempt(ranks: Processes, event: int = event) -> str:
            writer = writer_of(root, ranks, background=background, keep=1)
            if ranks.rank in killed:
                die_at(event, root)
            save(writer, ranks, 2)
            writer.finish()
            return "done"

        def recover(ranks: Processes) -> int:
            step = check(root, ranks).step
            writer = writer_of(root, ranks, background=background, keep=1)
            save(writer, ranks, 3)
            writer.finish()
            return step

        results = on_ranks(2, attempt)
        found.append(check(root).step)
        if results == ["done", "done"]:
            assert found[-1] == 2
            return {"events": event - 1, "old": found.count(1), "new": found[:-1].count(2)}
        assert {"signal": 9} in results, results
        assert all("signal" in r or "error" in r for r in results if r != "done"), results
        if event % 3 == 1:
            assert on_ranks(2, recover) == [found[-1]] * 2
            assert sorted(os.listdir(root)) == ["latest", "step_00000003"], os.listdir(root)
            assert check(root).step == 3
        event += 1


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "in_the_foreground": in_the_foreground,
    "in_the_background": in_the_background,
    "a_rank_is_refused": a_rank_is_refused,
    "the_folder_is_refused": the_folder_is_refused,
    "a_rank_has_a_bug": a_rank_has_a_bug,
    "contents_are_refused": contents_are_refused,
    "the_layout_changes": the_layout_changes,
    "every_rank_hashes_a_share": every_rank_hashes_a_share,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    if sys.argv[2] == "scenarios":
        print(json.dumps({name: run(base / name / "c") for name, run in SCENARIOS.items()}))
    else:
        killed = tuple(int(rank) for rank in sys.argv[3])
        report = kill_at_every_event(base, killed, sys.argv[2] == "background")
        print(json.dumps(report))
