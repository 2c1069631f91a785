"""OpenMP threads that wait do so asleep, so that a busy neighbour does not stop a run on a CPU.

At the end of each parallel region the threads wait for each other; by default they spin, for
milliseconds, and where another process computes too they hold the core that the awaited thread
needs. Two threads beside one busy process: 4.6 to 6.3 s a step of the default run spinning, 0.6 s
asleep, where an idle machine takes 0.35 s spinning and 0.36 to 0.39 s asleep
(launch/measure_neighbour.py).
"""

from __future__ import annotations

from collections.abc import MutableMapping

# what decides it in the OpenMP libraries that torch is built with: GNU's, LLVM's and Intel's
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def let_waiting_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Set the wait policy unless the user did; to be called before torch is imported."""
    if not any(name in environment for name in CHOICES):
        environment["OMP_WAIT_POLICY"] = "passive"
