"""The states of a source and of a coordinator, and the signal by which a run is ended: the first cause wins."""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from input_workers.errors import Failure, LifecycleError, describe

__all__ = ["Ended", "State", "StopSignal", "WakeUp", "refuse_inside", "released", "seconds_left"]

# Where the enqueuer sleeps. A token means "look again"; spare ones do no harm. SimpleQueue.put is reentrant, so that
# even a finalizer may wake it.
WakeUp: TypeAlias = "queue.SimpleQueue[None]"


def seconds_left(deadline: float) -> float:
    """Return how long to wait until `time.monotonic()` reaches the deadline: at least 0, at most what a lock can wait."""
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)


@contextmanager
def released(locks: Iterable[Any]) -> Iterator[None]:
    """Let go of those re-entrant locks that the calling thread holds, and take them again afterwards.

    It holds one only in a signal handler that has interrupted it inside. Threads that are waited for may need the lock; what
    was half done in there must stand whatever they do, as it does once everything was aborted.
    """
    held = [(lock, lock._release_save()) for lock in locks if lock._is_owned()]
    try:
        yield
    finally:
        for lock, state in held:
            lock._acquire_restore(state)


def refuse_inside(lock: Any) -> None:
    """Raise LifecycleError if the calling thread holds this re-entrant lock: a signal handler has interrupted it inside."""
    if lock._is_owned():
        raise LifecycleError(
            "called by a signal handler that has interrupted this thread while it took a batch; set a flag in the handler, and "
            "make the call in the training loop (stop() may be called by a handler)"
        )


class State(enum.Enum):
    """Allowed moves: NEW -> STARTING -> RUNNING -> STOPPING -> STOPPED -> STARTING; STARTING -> NEW or STOPPED if it fails."""

    NEW = "new"  # never started
    STARTING = "starting"  # init functions are called, frameworks loaded
    RUNNING = "running"  # until it is stopped, also when every source has ended
    STOPPING = "stopping"  # threads are being joined
    STOPPED = "stopped"  # may be started again


class Ended:
    """Set once, when a run ends. Like threading.Event, but re-entrant: a signal handler may set it while its thread does."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # over a re-entrant lock
        self._is_set = False

    def is_set(self) -> bool:
        """Whether the run has ended."""
        return self._is_set

    def set(self) -> None:
        """Wake those that wait."""
        with self._changed:
            self._is_set = True
            self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the run ends, or the time is over; return whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_set, timeout_s)


class StopSignal:
    """Says that a run ends, and why. Thread-safe; `request_stop` may also be called by a finalizer.

    A failure ends the input, and what was accepted is still delivered; a stop ends everything at once.
    """

    # Invariant under lock: `failure` is set once, before `close_input` is called for it.

    def __init__(self, wake: WakeUp) -> None:
        self.wake = wake
        self.stopping = False  # a plain flag: a finalizer may set it
        self.ended = Ended()  # wakes fetchers that wait before they ask again
        self.failure: Failure | None = None
        self.close_input: Callable[[], None] = lambda: None  # set by the run: closes the chunk queue
        self.lock = threading.RLock()  # re-entrant, for a signal handler that stops the source

    def request_stop(self) -> None:
        """Ask the enqueuer to end the run. Takes no lock: it may run inside any allocation."""
        self.stopping = True
        self.wake.put(None)

    def fail(self, failure: Failure) -> bool:
        """Record the failure and close the input; True if it is the first, else it is attached to the first."""
        with self.lock:
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
