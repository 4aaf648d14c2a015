"""The states of a source and of a coordinator, and the signal by which a run is ended: the first cause wins."""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from input_workers.errors import Failure, describe

__all__ = ["State", "StopSignal", "WakeUp", "seconds_left"]

# Where the enqueuer sleeps. A token means "look again"; spare ones do no harm. SimpleQueue.put is reentrant, so that
# even a finalizer may wake it.
WakeUp: TypeAlias = "queue.SimpleQueue[None]"


def seconds_left(deadline: float) -> float:
    """Return how long to wait until `time.monotonic()` reaches the deadline: at least 0, at most what a lock can wait."""
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)


class State(enum.Enum):
    """Allowed moves: NEW -> STARTING -> RUNNING -> STOPPING -> STOPPED -> STARTING; STARTING -> NEW or STOPPED if it fails."""

    NEW = "new"  # never started
    STARTING = "starting"  # init functions are called, frameworks loaded
    RUNNING = "running"  # until it is stopped, also when every source has ended
    STOPPING = "stopping"  # threads are being joined
    STOPPED = "stopped"  # may be started again


class StopSignal:
    """Says that a run ends, and why. Thread-safe; `request_stop` may also be called by a finalizer.

    A failure ends the input, and what was accepted is still delivered; a stop ends everything at once.
    """

    # Invariant under _lock: `failure` is set once, before `close_input` is called for it.

    def __init__(self, wake: WakeUp) -> None:
        self.wake = wake
        self.stopping = False  # a plain flag: a finalizer may set it
        self.ended = threading.Event()  # wakes fetchers that wait before they ask again
        self.failure: Failure | None = None
        self.close_input: Callable[[], None] = lambda: None  # set by the run: closes the chunk queue
        self._lock = threading.Lock()

    def request_stop(self) -> None:
        """Ask the enqueuer to end the run. Takes no lock: it may run inside any allocation."""
        self.stopping = True
        self.wake.put(None)

    def fail(self, failure: Failure) -> bool:
        """Record the failure and close the input; True if it is the first, else it is attached to the first."""
        with self._lock:
            first = self.failure is None
            if self.failure is None:
                self.failure = failure
            elif len(self.failure.notes) < MAX_NOTES:
                later = f" ({describe(failure.cause)})" if failure.cause is not None else ""
                self.failure.notes.append(f"later: {failure.message}{later}")
        if first:
            self.ended.set()
            self.close_input()
            self.wake.put(None)
        return first


# Later failures attached to the first one; more would only repeat themselves.
MAX_NOTES = 16
