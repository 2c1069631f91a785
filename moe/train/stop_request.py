"""Whether somebody asked this process to save and stop: SIGTERM and SIGUSR1 are noted, not obeyed.

A scheduler sends one of them before it takes the machine away. The training loop looks after each
step, so a save is never cut; Ctrl-C (SIGINT) stays what it is, KeyboardInterrupt at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Note stop signals while the context is open; restore the handlers that were there before.

    Python lets only the main thread install handlers: in another one this context does nothing.
    """

    signal_name: str | None

    def __init__(self) -> None:
        self.signal_name = None  # of the first signal; later ones change nothing
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._note)
                # libraries in C++ need not know that a system call can be interrupted
                signal.siginterrupt(number, False)
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
