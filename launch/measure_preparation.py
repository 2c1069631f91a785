"""Kill launch/prepare_data.py at ten places: the same bytes in the end? Memory and rates, too.

usage: python launch/measure_preparation.py [--megabytes 2000] [--processes 0] [--folder FOLDER]

Text is made on the spot: JSON lines, the same packed as .zst, and one long text. The command is
killed (SIGKILL) in every stage and started again; then it runs once more into another folder and
nobody kills it. Prints each kill with what was kept, the most memory of all its processes together,
and the rates; exits with 1 where a byte differs. The folder needs three times the text; what was
made in it is removed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels")]

from moe.data.building import building_folder  # noqa: E402
from moe.data.corpus import parts_of  # noqa: E402
from moe.data.source_files import source_files  # noqa: E402

# results of a stage, and which share of them is there when the command is killed; 0: one
PLACES = (
    ("survey", 0.25), ("survey", 0.75), ("sample", 0.0), ("tokenizer", 0.0), ("tokens", 0.0),
    ("tokens", 0.2), ("tokens", 0.4), ("tokens", 0.6), ("tokens", 0.8), ("shard", 0.0),
)  # fmt: skip
_STAGES = ("survey", "sample", "tokenizer", "tokens", "shard")
_SUFFIX = {"tokenizer": ".model"}
_SHARES = {"a.jsonl": 0.3, "b.jsonl": 0.3, "packed.jsonl.zst": 0.15, "long.txt": 0.25}


def main() -> int:
    """Make text, prepare it under kills and without, compare; the exit code says whether equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=2000, help="of text")
    parser.add_argument("--processes", type=int, default=0, help="num_processes of the command")
    parser.add_argument("--folder", type=Path, default=None, help="where it is made")
    arguments = parser.parse_args()
    if arguments.megabytes < 1:
        parser.error("--megabytes: must be at least 1")
    with tempfile.TemporaryDirectory(prefix="phimoe_text_", dir=arguments.folder) as name:
        folder = Path(name)
        make_text(folder / "text", num_bytes=arguments.megabytes * 10**6)
        number = len(parts_of(list(source_files([str(folder / "text")], on_skip=_no_skip))))
        print(f"{arguments.megabytes} MB of text in {number} parts", flush=True)
        hashes = []
        for target, places in ((folder / "killed", PLACES), (folder / "whole", ())):
            seconds = _prepare(folder, target, places, number, arguments.processes)
            hashes.append(content_hash(target))
            print(f"{target.name}: {seconds:.0f} s, content {hashes[-1][:16]}", flush=True)
            shutil.rmtree(target)
    is_equal = hashes[0] == hashes[1]
    print("the same bytes" if is_equal else "the bytes differ")
    return 0 if is_equal else 1


def make_text(folder: Path, *, num_bytes: int) -> None:
    """Files of records and one long text, of words drawn like those of a language."""
    import pyarrow

    folder.mkdir()
    generator = random.Random(11)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(30000)]
    weights = [1 / (rank + 5) for rank in range(len(words))]
    paragraphs = [
        " ".join(generator.choices(words, weights, k=90)).capitalize() + ".\n" for _ in range(6000)
    ]
    numbers = iter(range(10**12))

    def texts(size: int, *, as_records: bool) -> Iterator[bytes]:
        while size > 0:
            number = next(numbers)
            text = f"Number {number}. " + "".join(generator.choices(paragraphs, k=4))
            if as_records:
                record = {"text": text, "domain": ("web", "books", "news")[number % 3]}
                text = json.dumps(record) + "\n"
            size -= len(text)
            yield text.encode()

    for name, share in _SHARES.items():
        chunks = texts(int(share * num_bytes), as_records="jsonl" in name)
        with open(folder / name, "wb", buffering=2**20) as file:
            if not name.endswith(".zst"):
                file.writelines(chunks)
                continue
            with pyarrow.CompressedOutputStream(file, "zstd") as packed:
                for chunk in chunks:
                    packed.write(chunk)


def content_hash(folder: Path) -> str:
    """Of the names and the bytes of every file."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def _prepare(
    folder: Path, target: Path, places: tuple[tuple[str, float], ...], number: int, processes: int
) -> float:
    """Start the command until it comes to its end; returns the seconds of all starts together."""
    command = [
        sys.executable, str(_ROOT / "launch/prepare_data.py"), "data=files",
        f"data.sources=['{folder / 'text'}']", "tokenizer.vocab_size=8192",
        f"paths.data_dir='{target}'", f"num_processes={processes}",
    ]  # fmt: skip
    began, left = time.monotonic(), list(places)
    while True:
        with (folder / "log").open("wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
            most = 0
            while child.poll() is None:
                most = max(most, _resident_mib(child.pid))
                if left and _results(target, left[0][0]) >= max(1, left[0][1] * number):
                    child.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.1)
            code = child.wait()
        if code not in (0, -signal.SIGKILL):
            raise SystemExit((folder / "log").read_text(errors="replace"))
        kept = ", ".join(f"{_results(target, stage)} {stage}" for stage in _STAGES)
        what = "came to its end" if code == 0 else f"killed {len(places) - len(left) + 1}: {kept}"
        print(f"{target.name}: {what}; at most {most} MiB", flush=True)
        if code == 0:
            print((folder / "log").read_text(errors="replace").splitlines()[-2], flush=True)
            return time.monotonic() - began
        left.pop(0)


def _results(target: Path, stage: str) -> int:
    """How many results of a stage are kept."""
    return len(list(building_folder(target).glob(f"{stage}-*{_SUFFIX.get(stage, '.json')}")))


def _resident_mib(pid: int) -> int:
    """Of a process and all below it; pages that they share count for each."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError, ValueError):
            continue  # it has ended meanwhile
        total += pages * os.sysconf("SC_PAGE_SIZE")
    return total >> 20


def _no_skip(origin: str, reason: str) -> None:
    """Nothing is left out of text made here."""


if __name__ == "__main__":
    sys.exit(main())
