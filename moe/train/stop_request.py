"""Whether somebody asked this process to save and stop: such signals are noted, not obeyed.

A scheduler sends one before it takes the machine away, a person presses Ctrl-C or closes a
terminal. The training loop looks after each step, so a save is never cut.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

# by which schedulers and people end a run: torchrun, Kubernetes and Ray send TERM, SLURM what it is
# told to (USR1 here, USR2 with submitit), a closed terminal HUP, the kernel XCPU at a limit of time
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
# a parent that ignores these (nohup, a shell's `&` without job control) wants its child to
_KEPT_IGNORED = (signal.SIGHUP, signal.SIGINT)
_ONCE = b"\nCtrl-C: saving after this step; again ends at once.\n"


class StopRequests:
    """Note stop signals while the context is open; restore the handlers that were there before.

    Ctrl-C is noted only inside `until_saved`, and only the first: elsewhere, and the second time,
    it is KeyboardInterrupt. Python lets only the main thread install handlers: in another one this
    context does nothing.
    """

    signal_name: str | None

    def __init__(self) -> None:
        self.signal_name = None  # of the first signal; later ones change nothing
        self._has_interrupt = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if not is_kept_ignored(number):
                    self._before[number] = _handle(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python cannot be put back by it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    @contextlib.contextmanager
    def until_saved(self) -> Iterator[None]:
        """Inside, where there is something to save, the first Ctrl-C is noted as well."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or is_kept_ignored(signal.SIGINT):
            yield
            return
        before = _handle(signal.SIGINT, self._note_once)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name

    def _note_once(self, number: int, frame: FrameType | None) -> None:
        if self._has_interrupt:
            raise KeyboardInterrupt
        self._has_interrupt = True
        self._note(number, frame)
        if os.environ.get("RANK", "0") == "0":
            # print would take a lock that the interrupted code may hold
            with contextlib.suppress(OSError):
                os.write(2, _ONCE)


def is_kept_ignored(number: signal.Signals) -> bool:
    """Whether the parent process ignores this signal and means its children to."""
    return number in _KEPT_IGNORED and signal.getsignal(number) is signal.SIG_IGN


def _handle(number: signal.Signals, handler: Any) -> Any:
    before = signal.signal(number, handler)
    # libraries in C++ need not know that a system call can be interrupted
    signal.siginterrupt(number, False)
    return before
