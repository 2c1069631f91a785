"""What many tests need: the real commands as processes, prepared text, and a trained run."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode puts no folder of tests on it
from forked_programs import ForkServer

if not torch.cuda.is_available():
    # before any kernel is defined: Triton then interprets them on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
# what a test must not inherit: a launcher's ranks, the user's W&B, Hydra's own switches
_LEFT_OUT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LEFT_OUT_PREFIXES = ("WANDB_", "HYDRA_", "GLOO_", "NCCL_", "COLUMNS", "TRITON_")
# modules of the standard library, short enough that validating on one takes a blink; two domains
_CODE = ("heapq.py", "queue.py", "sched.py", "shlex.py", "stat.py", "textwrap.py")
_MORE = ("bisect.py", "calendar.py", "cmd.py", "copy.py", "fractions.py", "string.py")

# what people and schedulers end a run by
_ENDING_SIGNALS = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM,
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip

RunCommand = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure() -> None:
    """Give the processes that tests start the default signals, whatever this one was started with.

    A job that a script puts in the background starts with SIGINT ignored, under nohup SIGHUP, too,
    and a program inherits what is ignored. It does not inherit a handler: one that does nothing
    keeps this process as deaf as it was asked to be.
    """
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING_SIGNALS)


@dataclass(frozen=True)
class Workplace:
    """A working directory with texts/, data/tiny, data/other (other text), runs/a (four steps).

    Shared by the tests of a session: look, do not touch; `copy` gives one's own.
    """

    folder: Path

    @property
    def train(self) -> list[str]:
        """The overrides of runs/a but for its folder."""
        return [
            "experiment=nano", "parallel=plain", "data.name=tiny", "tokenizer.vocab_size=512",
            "train.steps=4", "train.save_every=2", "train.evaluate_every=4",
            "train.precision=float32", "optim.warmup_steps=2",
        ]  # fmt: skip

    def copy(self, folder: Path) -> Workplace:
        """A copy of all of it, for tests that change something."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Workplace(folder)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a user in a fresh shell, with this checkout on the path."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIXES)
    }
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NETRC": os.devnull}


@pytest.fixture(scope="session")
def fork_server(environment: dict[str, str]) -> Iterator[ForkServer]:
    """A process that has imported torch, and starts programs that then need not."""
    server = ForkServer({**environment, "OMP_WAIT_POLICY": "passive"})
    yield server
    server.close()


@pytest.fixture(scope="session")
def command(environment: dict[str, str], fork_server: ForkServer) -> RunCommand:
    """Call command(name, *arguments, cwd=..., env=..., stdin=..., **more): launch/<name>.py.

    It is forked from a process that has imported torch, unless the environment is changed or
    something is called first: that may be about what happens before torch is imported.
    """

    def run(
        name: str,
        *arguments: str,
        cwd: Path,
        env: dict[str, str] | None = None,
        stdin: str = "",
        timeout: float = 240,
        preexec_fn: Callable[[], None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        program = [str(ROOT / "launch" / f"{name}.py"), *arguments]
        if not env and preexec_fn is None:
            return fork_server.run(program, cwd=cwd, env=environment, stdin=stdin, timeout=timeout)
        return subprocess.run(
            [sys.executable, *program],
            cwd=cwd, env=environment | (env or {}), input=stdin, timeout=timeout,
            preexec_fn=preexec_fn, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def workplace(command: RunCommand, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Prepare two small corpora and train a nano model for four steps, with the real commands."""
    made = Workplace(tmp_path_factory.mktemp("workplace"))
    library = Path(sysconfig.get_path("stdlib"))
    for domain, names in (("code", _CODE), ("more", _MORE)):
        folder = made.folder / "texts" / domain
        folder.mkdir(parents=True)
        for name in names:
            shutil.copy(library / name, folder / name)
    for name, source in (("tiny", "texts"), ("other", "texts/more")):
        done = command(
            "prepare_data", "data=files", f"data.name={name}", f"data.sources=[{source}]",
            "data.validation_fraction=0.2", "tokenizer.vocab_size=512", cwd=made.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = command("train", *made.train, "paths.run_dir=runs/a", cwd=made.folder)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="session")
def hashes() -> Callable[[Path], dict[str, str]]:
    """Call hashes(folder): the SHA-256 of every file below it, and each folder's name."""

    def of(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
            for path in sorted(folder.rglob("*"))
        }

    return of
