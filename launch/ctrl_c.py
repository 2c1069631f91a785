"""Ctrl-C while a command is still being imported: one line and 130, as later on."""

from __future__ import annotations

import os
import sys
from types import TracebackType


def _say(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, where)
        return
    print("error: interrupted.", file=sys.stderr, flush=True)
    os._exit(130)


sys.excepthook = _say
