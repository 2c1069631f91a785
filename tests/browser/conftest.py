"""A headless Chromium of the distribution, installed where that can be done; runs and traces."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from debian_packages import why_missing
from playwright.sync_api import Browser, sync_playwright

from moe.data.manifest import FileEntry
from moe.trace.info import VOCABULARY_NAME, read_info, write_info
from moe.train.atomic_files import hash_file, replace_file

# importlib mode puts no folder of tests on the path
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "launch")]

HOSTILE = (
    "<script>document.title='taken'</script>", "<img src=x onerror=\"document.title='taken'\">",
    "</td></table><h1 id=taken>", "' onmouseover='document.title=1'", "&lt;b&gt;", "{{7*7}}",
)  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real Chromium."""
    reason = why_missing({"chromium": "chromium"})
    if reason:
        pytest.skip(reason)
    with sync_playwright() as driver:
        path = shutil.which("chromium")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def place(workplace, command, tmp_path_factory) -> Path:
    """A copy of the workplace with runs/r, eight steps and every second recorded, and two traces.

    traces/a and traces/b: runs/a and runs/r over the same text; the second with hostile tokens.
    """
    folder = tmp_path_factory.mktemp("page")
    workplace.copy(folder)
    usual = [a for a in workplace.train if not a.startswith(("train.steps", "train.save_every"))]
    done = command("train", *usual, "train.steps=8", "train.save_every=4", "train.trace_every=2",
                   "seed=3", "paths.run_dir=runs/r", cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for run, target in (("runs/a", "traces/a"), ("runs/r", "traces/b")):
        done = command("trace", f"run={run}", f"target={target}", "max_tokens=3000", cwd=folder)
        assert done.returncode == 0, done.stderr
    _give_hostile_texts(folder / "traces/b")
    return folder


def _give_hostile_texts(folder: Path) -> None:
    texts = json.loads((folder / VOCABULARY_NAME).read_text())
    texts = [HOSTILE[n % len(HOSTILE)] for n in range(len(texts))]
    replace_file(folder / VOCABULARY_NAME, json.dumps(texts).encode())
    size, sha256 = hash_file(folder / VOCABULARY_NAME)[0]
    info = read_info(folder / "trace.json")
    entry = FileEntry(VOCABULARY_NAME, size, sha256)
    write_info(folder / "trace.json", dataclasses.replace(info, vocabulary=entry))
