"""The processes that prepare text: tasks in parallel, results in order, nothing left behind."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from moe.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def num_processes_for(requested: int) -> int:
    """The processes to use: as requested, or one for each core this process may run on."""
    if requested > 0:
        return requested
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """num_processes processes, started when there is work for two. A context manager."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # what they are doing is not wanted any more, and may take long
            for child in set(multiprocessing.active_children()) - self._others:
                child.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def in_order(
        self, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[Result]:
        """Yield function(task) of each task in order; function is a name of a module.

        Raises DataError if a process dies.
        """
        if self._num_processes <= 1 or len(tasks) <= 1:
            yield from map(function, tasks)
            return
        if self._pool is None:
            # spawn: a forked copy of a process with threads can hang
            self._pool = ProcessPoolExecutor(
                self._num_processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
            )
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(function, task))
                # a bound, so that tasks with their data do not pile up
                if len(waiting) > 2 * self._num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                f"num_processes={self._num_processes}: a process that prepares text ended "
                "unexpectedly, most often for lack of memory. Use fewer, e.g. num_processes=1."
            ) from None


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it, and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed says nothing; its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
