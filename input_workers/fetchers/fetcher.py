"""A fetcher: one concurrent caller of the fetch function, and who may take its call away."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

from input_workers.contracts import FetchRequest
from input_workers.metrics.fetcher_recorder import FetcherRecorder, waited

if TYPE_CHECKING:
    from input_workers.fetchers.recovery import Attempt

__all__ = ["Fetcher"]


class Fetcher:
    """The state of one fetcher. Written by its own thread, except where a method says otherwise.

    Attributes:
        worker_id: what the fetch function is called with.
        recorder: its counters.
        request: what is being fetched, or None.
        attempt: what is fetched in place of a call that failed, so that another fetcher can go on with it.
        resumes: why it begins with `attempt`, which another fetcher did not finish; None: it begins with a new call.
        released: it is to rest when its call has ended. Written by its backend.
        abandoned: its call took too long and was given to another fetcher; what it returns is discarded.
    """

    # Invariant under _claim: a call that `abandon` has taken away never ends; one that has ended is not taken away.

    __slots__ = ("_claim", "abandoned", "attempt", "recorder", "released", "request", "resumes", "worker_id")

    def __init__(self, recorder: FetcherRecorder) -> None:
        self.worker_id = recorder.worker_id
        self.recorder = recorder
        self.request: FetchRequest | None = None
        self.attempt: Attempt | None = None
        self.resumes: BaseException | None = None
        self.released = False
        self.abandoned = False
        self._claim = threading.Lock()

    @property
    def call_started(self) -> float:
        """`time.monotonic()` when the running call began; `inf` between calls. Any thread may ask."""
        return self.recorder.call_started

    def begin_call(self, request: FetchRequest | None) -> None:
        """A call begins. Its request is known before its start: whoever takes the call away needs that."""
        self.request = request
        self.recorder.request = None if request is None else request.index
        self.recorder.call_started = time.monotonic()

    def end_call(self, failed: bool = False) -> bool:
        """A call has returned or, if it has `failed`, raised; False: it was taken away, and its result is not used."""
        with self._claim:
            if self.abandoned:
                return False
            trace, started = self.recorder.trace, self.recorder.call_started
            if trace is not None and self.attempt is not None and started != math.inf:  # the loop notes the other calls
                trace.add(trace.failed_call if failed else trace.call, started, time.monotonic(), self.recorder.request)
            self.recorder.end_call(failed)
            return True

    def count_error(self, name: str) -> None:
        """A call raised an error of this name."""
        self.recorder.count_error(name)

    def abandon(self, overdue_since: float) -> bool:
        """Take the running call away if it began before; False: it has ended, or began later. Called by the watchdog."""
        recorder = self.recorder
        with self._claim:
            if self.abandoned or recorder.call_started > overdue_since:
                return False
            self.abandoned = True
            # The time of a call that is not used counts for nothing.
            recorder.worked = waited(recorder.worked, recorder.call_started), math.inf
            recorder.call_started = math.inf
            recorder.alive = False
            return True

    def begin_wait(self) -> None:
        """The fetcher waits for a request: that is no call."""
        recorder = self.recorder
        recorder.call_started = math.inf
        recorder.blocked = recorder.blocked[0], time.monotonic()

    def end_wait(self) -> None:
        """A request has come."""
        recorder = self.recorder
        recorder.call_started = now = time.monotonic()
        recorder.blocked = waited(recorder.blocked, now), math.inf
