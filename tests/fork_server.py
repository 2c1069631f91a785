"""The program that starts Python programs by fork, so that torch is imported once for all of them.

It imports libraries only, nothing of ours. Each request on the socket of standard input is one
JSON object and four descriptors: the program's three streams, and a pipe that gets its exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from pathlib import Path

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_MOST_BYTES = 1 << 20
# what our commands import; an optimiser imports torch._dynamo
_LIBRARIES = (
    "antlr4", "hydra.main", "hydra.core.override_parser.overrides_parser",
    "hydra._internal.core_plugins.basic_launcher", "hydra._internal.core_plugins.basic_sweeper",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin", "pydantic",
    "safetensors.torch", "sentencepiece", "torch._dynamo", "torch.fx.experimental.symbolic_shapes",
    "triton",
)  # fmt: skip


def main() -> None:
    """Import what takes long, then fork for each request until the tests close the socket."""
    requests = socket.socket(fileno=os.dup(0))
    _import_libraries()
    assert len(os.listdir("/proc/self/task")) == 1  # threads do not survive a fork
    ended, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    requests.sendall(b"ready")
    status_pipes: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _report(status_pipes)
        if requests not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, _MOST_BYTES, 4)
        if not message:
            return
        program = json.loads(message)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (requests.detach(), ended, wakes, *status_pipes.values()):
                os.close(descriptor)
            break
        for descriptor in descriptors[:3]:
            os.close(descriptor)
        status_pipes[pid] = descriptors[3]
        requests.sendall(str(pid).encode())
    _become(program, descriptors)


def _import_libraries() -> None:
    for name in _LIBRARIES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    # a collection in a fork would write to, and so copy, every page of what was imported here
    gc.collect()
    gc.freeze()


def _report(status_pipes: dict[int, int]) -> None:
    while status_pipes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        pipe = status_pipes.pop(pid)
        os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(pipe)


def _become(program: dict[str, object], descriptors: list[int]) -> None:
    """Be the program until its end, which is this process's end."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    for target, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, target)
    for descriptor in descriptors:
        os.close(descriptor)
    os.chdir(str(program["cwd"]))
    os.environ.clear()
    os.environ.update(program["env"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    path, *arguments = program["argv"]  # pyright: ignore[reportGeneralTypeIssues]
    sys.argv = [path, *arguments]
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [str(Path(path).resolve().parent), *paths, *(p for p in sys.path[1:])]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        code = _exit_code(ended)
    else:
        code = 0
    # the end of an interpreter but for taking torch's modules apart, which takes half a second
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _exit_code(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return (ended.code or 0) & 0xFF
    print(ended.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
