"""Explore a run or trace in the browser: who its experts are, on a page of this machine alone.

usage: python launch/explore.py [run=FOLDER] [trace=FOLDER] [compare=FOLDER] [key=value ...]

examples:
  python launch/explore.py                 (the newest run below runs/)
  python launch/explore.py run=runs/nano/2026-01-31_12-00-00
  python launch/explore.py trace=traces/nano
  python launch/explore.py run=runs/a trace=traces/a compare=runs/b port=8000 browser=false
run is a run folder, shown by its training log and, where there is one, its routing/ (recorded with
train.trace_every=N) or the trace given. compare is another run or trace, to stand beside it. What
is counted of a trace is kept beside it, so the next start is quick. Ctrl-C ends the page.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from command import run_command
from page_server import HOST
from sigterm import sigterm_as_interrupt

from moe.errors import CheckpointError, ConfigError, DataError, UserError
from moe.explore_config import ExploreConfig

if TYPE_CHECKING:
    from analysis.explore.page_file import PageFile, SideFiles
    from analysis.explore.sources import Source

    OnProgress = Callable[[str, int, int], None]

_ROOT = Path(__file__).resolve().parent.parent
_START_SECONDS = 90.0
_RUN_ID_NAME = "run_id"


def explore(config: ExploreConfig) -> None:
    """Find what is asked for, count what is not counted yet, and show the page until Ctrl-C."""
    from analysis.explore.page_file import save_page
    from analysis.explore.sources import find_source

    _require_packages()
    port = _free_port(config.port)
    if config.trace and not config.run:
        sources = [find_source(config.trace, key="trace")]
    else:
        sources = [find_source(config.run or _newest_run(), trace=config.trace)]
    if config.compare:
        sources.append(find_source(config.compare, key="compare"))
    for source in sources:
        _say(source)
    if config.run and config.trace:
        _require_same_model(sources[0])
    with tempfile.TemporaryDirectory(prefix="explore-") as temporary:
        page = _prepare(sources, Path(temporary))
        path = Path(temporary) / "page.json"
        save_page(path, page)
        _serve(path, port, has_browser=config.browser and _has_display())


def _newest_run() -> str:
    """The run below runs/ whose log was written last; ConfigError where there is none."""
    logs = sorted(Path("runs").glob("**/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise ConfigError(
            "run: not given, nor trace, and there is no run below runs/. Give a run folder, e.g. "
            "run=runs/nano/2026-01-31_12-00-00, or the folder of a trace, e.g. trace=traces/nano."
        )
    return str(logs[-1].parent)


def _prepare(sources: list[Source], temporary: Path) -> PageFile:
    """Count what is not counted yet; files of this page alone go to a temporary folder."""
    from analysis.explore.page_file import PageFile
    from moe.train.progress import progress_bar

    with progress_bar("explore") as on_progress:
        sides = tuple(
            _side_files(source, temporary / str(number), on_progress)
            for number, source in enumerate(sources)
        )
        pair, note = _pair(sources, temporary, on_progress)
    notes = tuple(source.note for source in sources if source.note)
    return PageFile(sides, pair, note, notes)


def _side_files(source: Source, temporary: Path, on_progress: OnProgress) -> SideFiles:
    from analysis.explore.index import build_index, find_index
    from analysis.explore.page_file import SideFiles
    from analysis.explore.run_log import save_log

    temporary.mkdir()
    log = index = None
    if source.log is not None:
        log = temporary / "log.safetensors"
        save_log(log, source.log)
    if source.trace is not None:
        trace, started = source.trace, time.monotonic()
        found = find_index(trace.folder, trace.info)
        if found is None:
            folder = _writable(trace.folder, temporary)
            found = build_index(trace, folder, on_progress=on_progress)
            print(f"index: {found.path}, counted in {time.monotonic() - started:.1f} s", flush=True)
        else:
            print(f"index: {found.path}, counted before", flush=True)
        index = str(found.path.resolve())  # the page runs in another folder
    return SideFiles(source.title, source.facts, None if log is None else str(log), index)


def _pair(
    sources: list[Source], temporary: Path, on_progress: OnProgress
) -> tuple[str | None, str]:
    """The file of what two traces of the same tokens agree in, or none and why."""
    from analysis.explore.pair import count_pair, open_pair, pair_path, save_pair
    from moe.trace.read import require_same_tokens

    traces = [source.trace for source in sources if source.trace is not None]
    if len(sources) < 2:
        return None, ""
    if len(traces) < 2:
        return None, "Choices are compared token by token where both sides have a trace."
    one, two = traces
    try:
        require_same_tokens(one, two)
        path = pair_path(one.folder, one, two)
        try:
            open_pair(path)
        except DataError:
            path = pair_path(_writable(one.folder, temporary), one, two)
            save_pair(path, count_pair(one, two, on_progress=on_progress))
    except DataError as error:
        return None, f"Choices are not compared token by token. {error}"
    return str(path.resolve()), ""


def _writable(folder: Path, otherwise: Path) -> Path:
    """The folder, or the other one where nothing can be written to it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = error.strerror or error
        print(f"note: {folder} cannot be written ({reason}); counted for this time only.",
              file=sys.stderr, flush=True)  # fmt: skip
        return otherwise


def _require_same_model(source: Source) -> None:
    """Refuse a trace of another model than the run's; note where that cannot be known any more."""
    assert source.run is not None
    assert source.trace is not None
    info, run = source.trace.info, source.run
    if info.kind == "training":
        path = run / _RUN_ID_NAME
        known = path.read_text().strip() if path.is_file() else ""
        if known and known != info.setting("run"):
            raise _other_model(source, f"run {info.setting('run')}", f"run {known}")
        return
    from moe.run_folder import checkpoint_name

    step = info.setting("step")
    folder = run / "checkpoints" / checkpoint_name(int(step or 0))
    if not folder.is_dir():
        print(f"note: {run} keeps no checkpoint of step {step}: whether the trace is of this "
              "run is not checked.", file=sys.stderr, flush=True)  # fmt: skip
        return
    print(f"checkpoint: {folder}, compared with the trace's model", flush=True)
    from moe.load_run import open_run
    from moe.trace.corpus import model_sha256

    opened = open_run(str(folder), on_skip=lambda why: None)
    found = model_sha256(opened)  # type: ignore[arg-type] # what it reads of a run, both have
    if found != info.model_sha256:
        raise _other_model(source, f"SHA-256 {info.model_sha256[:12]}", f"SHA-256 {found[:12]}")


def _other_model(source: Source, got: str, known: str) -> UserError:
    assert source.trace is not None
    return CheckpointError(
        f"trace: {source.trace.folder} is of another model ({got}) than {source.run} ({known}). "
        "Give the run that was traced, or the trace alone, without run."
    )


def _say(source: Source) -> None:
    if source.run is not None:
        print(f"run: {source.run}")
    if source.trace is not None:
        print(f"trace: {source.trace.folder}")
    for name, value in source.facts:
        print(f"  {name}: {value}")
    if source.note:
        print(f"note: {source.note}", file=sys.stderr)
    sys.stdout.flush()


def _serve(page: Path, port: int, *, has_browser: bool) -> None:
    """Run the page's server until Ctrl-C, or until it ends by itself, which is an error."""
    command = [sys.executable, "-P", str(_ROOT / "launch" / "page_server.py"), str(port)]
    folders = (str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    # settings of the user's own notebooks must not change the page: it reads none from here
    environment |= {"XDG_CONFIG_HOME": str(page.parent), "MARIMO_SKIP_UPDATE_CHECK": "1"}
    environment["EXPLORE_PAGE"] = str(page)
    # other users of the machine reach the port, too; standard input keeps the token out of the list
    # of processes
    token = secrets.token_urlsafe(24)
    address = f"http://{HOST}:{port}"
    with sigterm_as_interrupt(), subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        cwd=page.parent,
    ) as server:  # fmt: skip
        assert server.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError), server.stdin as pipe:  # it has ended already
                pipe.write(token.encode())
            _wait_for(address, server)
            address = f"{address}?access_token={token}"
            print(f"page: {address} (Ctrl-C ends it)", flush=True)
            if has_browser:
                import webbrowser

                webbrowser.open(address)
            server.wait()
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=5)
            server.kill()
    raise UserError(f"page: the server ended by itself with exit code {server.returncode}.")


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None:
        with contextlib.suppress(OSError), opener.open(f"{address}/health", timeout=2):
            return
        if time.monotonic() > deadline:
            raise UserError(f"page: no answer from {address} in {_START_SECONDS:.0f} s.")
        time.sleep(0.1)
    raise UserError(f"page: the server ended at its start with exit code {server.returncode}.")


def _free_port(port: int) -> int:
    """The port, or a free one for 0; ConfigError where another program has it."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port: {port} of {HOST} cannot be had ({error.strerror}). Give another one, or 0 "
                "for a free one."
            ) from None
        return int(taken.getsockname()[1])


def _has_display() -> bool:
    is_desktop = sys.platform in ("darwin", "win32")
    return is_desktop or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _require_packages() -> None:
    import importlib.util

    missing = [name for name in ("marimo", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"explore: the page needs {' and '.join(missing)}, which is not installed: "
            f"python -m pip install {' '.join(missing)}"
        )


if __name__ == "__main__":
    run_command(
        "explore",
        ExploreConfig,
        explore,
        about=__doc__,
        writes=None,
        literal=("run", "trace", "compare"),
        on_interrupt="the page is closed.",
    )
