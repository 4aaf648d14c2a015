"""What happens at interpreter exit, and after a fork, to runs that nobody stopped.

Daemon threads must have ended before the interpreter is torn down under them: one inside a native call would abort it.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import Protocol

__all__ = ["forget", "remember"]

# All runs together may take this long at exit.
EXIT_SECONDS = 5.0


class LiveRun(Protocol):
    """A run as the exit hook sees it."""

    forked: bool

    def request_stop(self) -> None:
        """Ask every thread to end."""

    def stop(self, deadline: float) -> object:
        """Wait for them until `time.monotonic()` reaches the deadline."""


# Invariant under _lock: every run with a living thread is in _runs. Held strongly: a dropped run with threads inside
# native code aborted the interpreter at exit.
_lock = threading.RLock()
_runs: set[LiveRun] = set()


def remember(run: LiveRun) -> None:
    """Hold the run until `forget`. The hook is registered anew, behind those of frameworks imported meanwhile."""
    with _lock:
        _runs.add(run)
        atexit.unregister(_stop_all)
        atexit.register(_stop_all)


def forget(run: LiveRun) -> None:
    """The run's threads have ended."""
    with _lock:
        _runs.discard(run)


def _stop_all() -> None:
    with _lock:
        runs = list(_runs)
    deadline = time.monotonic() + EXIT_SECONDS
    for run in runs:
        run.request_stop()
    for run in runs:
        run.stop(deadline)


def _after_fork_in_child() -> None:
    # The threads are the parent's, and a lock may be held by one of them: nothing here may be waited for.
    global _lock
    _lock = threading.RLock()
    for run in list(_runs):
        run.forked = True
    _runs.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
